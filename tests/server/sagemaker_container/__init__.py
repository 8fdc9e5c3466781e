"""Tests of `server.sagemaker_container`."""

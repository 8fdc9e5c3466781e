"""Tests of `model_store.archives`."""

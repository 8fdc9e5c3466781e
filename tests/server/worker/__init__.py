"""Tests of `server.worker`."""

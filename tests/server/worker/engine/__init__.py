"""Tests of `server.worker.engine`."""

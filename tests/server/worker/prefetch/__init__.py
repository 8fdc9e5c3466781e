"""Tests of `server.worker.prefetch`."""

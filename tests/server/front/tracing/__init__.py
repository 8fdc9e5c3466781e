"""Tests of `server.front.tracing`."""

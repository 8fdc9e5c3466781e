"""Tests of `server.offline`."""

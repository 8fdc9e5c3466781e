"""Tests of `server.routes`."""

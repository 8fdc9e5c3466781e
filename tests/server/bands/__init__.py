"""Tests of `server.bands`."""

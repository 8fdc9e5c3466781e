"""Tests of `server.front.dialects`."""

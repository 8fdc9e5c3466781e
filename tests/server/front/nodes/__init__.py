"""Tests of `server.front.nodes`."""

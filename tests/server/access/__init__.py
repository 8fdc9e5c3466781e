"""Tests of `server.access`."""

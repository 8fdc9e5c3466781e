"""Tests of `server.supervisor`."""

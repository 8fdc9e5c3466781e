"""Tests of `server.ipc`."""

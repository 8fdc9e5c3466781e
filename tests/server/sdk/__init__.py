"""Tests of `server.sdk`."""

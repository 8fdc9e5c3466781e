"""Tests of `server.offline.migration`."""

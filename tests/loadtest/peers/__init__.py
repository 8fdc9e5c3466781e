"""Tests of `loadtest.peers`."""

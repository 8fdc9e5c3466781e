"""Tests of `loadtest.observe`."""

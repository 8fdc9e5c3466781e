"""Tests of `loadtest.fleets`."""

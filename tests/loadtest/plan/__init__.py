"""Tests of `loadtest.plan`."""

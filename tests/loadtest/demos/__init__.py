"""Tests of `loadtest.demos`."""

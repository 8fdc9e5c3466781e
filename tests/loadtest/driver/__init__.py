"""Tests of `loadtest.driver`."""

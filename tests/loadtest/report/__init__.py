"""Tests of `loadtest.report`."""

"""Tests of `loadtest.benchmarks`."""

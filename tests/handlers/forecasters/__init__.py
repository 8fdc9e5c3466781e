"""Tests of `handlers.forecasters`."""

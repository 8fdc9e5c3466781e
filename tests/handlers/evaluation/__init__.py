"""Tests of `handlers.evaluation`."""

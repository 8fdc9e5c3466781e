"""Tests of `handlers.training`."""

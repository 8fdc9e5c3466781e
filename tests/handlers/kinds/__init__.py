"""Tests of `handlers.kinds`."""

"""Tests of asynchronous invocations."""

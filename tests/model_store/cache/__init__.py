"""Tests of `model_store.cache`."""

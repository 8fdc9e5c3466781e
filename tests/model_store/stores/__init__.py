"""Tests of `model_store.stores`."""

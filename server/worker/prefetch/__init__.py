"""Prefetching: loads models before they are requested, by the rhythm of past requests."""

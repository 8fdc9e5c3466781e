"""Loads that begin before anyone asks, by the rhythm of past requests."""

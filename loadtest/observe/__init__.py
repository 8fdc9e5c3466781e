"""Observation of a server and its host from outside."""

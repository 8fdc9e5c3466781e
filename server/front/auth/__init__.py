"""Checks of signed requests (SigV4)."""

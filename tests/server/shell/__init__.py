"""Tests of how commands look in a shell."""

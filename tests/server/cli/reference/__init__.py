"""Mirrors server/cli/reference."""

"""Mirrors `server/worker/survivors`."""

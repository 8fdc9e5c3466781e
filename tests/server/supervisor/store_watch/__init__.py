"""Tests of `server.supervisor.store_watch`."""

"""Tests of server/worker/sandbox, with real processes."""

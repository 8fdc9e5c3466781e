"""The fixtures of end-to-end tests: a server, and the bucket that it serves."""

from tests.e2e.conftest import serve, store

__all__ = ["serve", "store"]

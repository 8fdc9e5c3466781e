"""Tests of `server.supervisor.actuals`."""

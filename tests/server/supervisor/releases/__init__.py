"""Tests of `server.supervisor.releases`."""

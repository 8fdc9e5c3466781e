"""Tests of `server.supervisor.model_server_api`."""

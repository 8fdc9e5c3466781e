"""Tests of `server.supervisor.registrations`."""

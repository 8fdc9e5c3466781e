"""Tests of `server.front.auth`."""

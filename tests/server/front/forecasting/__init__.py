"""Tests of server.front.forecasting."""

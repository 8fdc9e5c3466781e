"""Scores of forecasts, and how markets move together."""

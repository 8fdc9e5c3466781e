"""Scores of forecasts, and the correlation of their errors."""

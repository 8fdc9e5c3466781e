"""What dialects of forecasting clients share: bounded bodies, what a model says of itself, many forecasts."""

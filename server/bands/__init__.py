"""What observed prices say of forecasts: adaptive bands, coverage and drift. Pure: standard library and msgspec."""

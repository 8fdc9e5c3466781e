"""From price series to fitted networks."""

"""The running program: fronts, workers and the supervisor that owns them."""

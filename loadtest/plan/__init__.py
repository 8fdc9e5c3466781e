"""The planner: how many models fit, what the tail will be, what it costs; before the money is spent. A simulation."""

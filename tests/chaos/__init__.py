"""Faults of every kind under load, and a checker that counts every answer. `python -m tests.chaos.run --help`."""

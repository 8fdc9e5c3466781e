"""The benchmarks of `fleetcast-load bench NAME`."""

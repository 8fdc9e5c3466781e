"""The demos of `fleetcast-load demo NAME`."""

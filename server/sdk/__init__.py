"""What a Python program imports as `fleetcast`."""

"""`import fleetcast`."""

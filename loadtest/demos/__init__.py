"""What `fleetcast-load demo NAME` runs."""

"""What `fleetcast-load bench NAME` runs."""

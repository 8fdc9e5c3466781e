"""What Fleetcast is measured against, in the same run, on the same machine, with the same weights and body."""

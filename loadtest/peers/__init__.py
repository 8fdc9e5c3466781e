"""Other servers, measured in the same run and on the same machine as Fleetcast, with the same weights and body."""

"""One file a command of `fleetcast`: parses arguments, prints, and imports its work when it runs."""

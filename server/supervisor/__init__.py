"""The process that starts, watches and ends the others, with the management API. It imports no torch."""

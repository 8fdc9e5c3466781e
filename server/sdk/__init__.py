"""The SDK. `server/sdk/fleetcast` is what a Python program imports as `fleetcast`. Imports no torch."""

__version__ = "0.1.0"  #: of the whole distribution: pyproject.toml reads it here

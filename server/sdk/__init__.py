"""What a Python program imports as `fleetcast`."""

__version__ = "0.1.0"  #: of the whole distribution: pyproject.toml reads it here

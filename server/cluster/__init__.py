"""Servers as replicas of a Ray Serve deployment: `fleetcast[ray]`. INVARIANT: only this package imports ray."""

"""Resident models follow the store: by comparison (`watch`, `lookups`) and by what the store tells (`events`)."""

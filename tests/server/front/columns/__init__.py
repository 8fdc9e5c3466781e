"""Tables of calls for many models."""

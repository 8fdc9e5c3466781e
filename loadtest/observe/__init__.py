"""A server and its host seen from outside."""

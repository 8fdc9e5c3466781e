"""Tests of the handlers: networks, runners and codecs."""

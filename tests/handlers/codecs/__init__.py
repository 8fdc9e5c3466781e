"""Tests of `handlers.codecs`."""

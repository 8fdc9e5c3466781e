"""Tests, one folder per package; `s3.py` and `conftest.py` are what they share."""

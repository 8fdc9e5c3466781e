"""The tests, with one folder per package; they share `s3.py`, `archives.py` and `conftest.py`."""

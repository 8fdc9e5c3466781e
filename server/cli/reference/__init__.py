"""The generated pages of `docs/reference`: what the program itself knows of its settings, metrics, routes and so on.

`make docs` writes them by `docs/write_reference.py`, and a test fails while one is out of date.
"""

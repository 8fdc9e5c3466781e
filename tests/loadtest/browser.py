"""The headless Chromium of tests, which a benchmark uses as well."""

from loadtest.observe.browser import CHROMIUM, Browser, open_browser

__all__ = ["CHROMIUM", "Browser", "open_browser"]

"""The time-outs of tests for events that are immediate on a quiet machine. Only a hang exceeds them."""

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

PATIENCE_S = 120.0  #: less than pytest's time-out, so that the test itself says what did not come
POLL_S = 0.02


def wait_until(predicate: Callable[[], T], what: str) -> T:
    """The predicate's first true value. Raises AssertionError that says what never happened."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        value = predicate()
        if value:
            return value
        assert time.monotonic() < deadline, f"not within {PATIENCE_S:g} s: {what} (last: {value!r})"
        time.sleep(POLL_S)

"""The time-outs of tests for events that are immediate on a quiet machine. Only a hang exceeds them.

Where what is tested is itself a limit in seconds, a machine that stands still fails it: see `repeat_in_stalls`.
"""

import threading
import time
from collections.abc import Callable
from typing import Self, TypeVar

T = TypeVar("T")

PATIENCE_S = 120.0  #: less than pytest's time-out, so that the test itself says what did not come
POLL_S = 0.02
STALL_S = 0.3  #: by which a thread that only sleeps wakes up late where the machine stands still
MOST_STALLED = 5  #: trials of a test that found the machine standing still in each


def wait_until(predicate: Callable[[], T | None], what: str) -> T:
    """The predicate's first true value. Raises AssertionError that says what never happened."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        value = predicate()
        if value:
            return value
        assert time.monotonic() < deadline, f"not within {PATIENCE_S:g} s: {what} (last: {value!r})"
        time.sleep(POLL_S)


class StallWatch:
    """`with StallWatch() as watch`: the most seconds by which a thread that only sleeps has woken up late."""

    def __init__(self) -> None:
        self.longest_s = 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="stall watch")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def __repr__(self) -> str:
        """For example `<StallWatch 0.012 s>`."""
        return f"<StallWatch {self.longest_s:.3f} s>"

    def _run(self) -> None:
        due = time.monotonic() + POLL_S
        while not self._over.wait(max(0.0, due - time.monotonic())):
            now = time.monotonic()
            self.longest_s = max(self.longest_s, now - due)
            due = now + POLL_S
        self.longest_s = max(self.longest_s, time.monotonic() - due)


def repeat_in_stalls(trial: Callable[[int], None]) -> None:
    """Call this with 0, and with 1, 2 and so on as long as it fails while the machine stands still.

    A trial that fails on a machine that turns fails the test.
    """
    for i in range(MOST_STALLED):
        watch = StallWatch()
        try:
            with watch:
                trial(i)
        except (AssertionError, OSError):
            if watch.longest_s < STALL_S or i == MOST_STALLED - 1:
                raise
        else:
            return

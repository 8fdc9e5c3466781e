"""Ends runs of ONNX sessions that take too long, on a thread of its own."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

WATCH_S = 0.02  #: how late a run that takes too long may be ended


class Watchdog:
    """Ends runs of sessions at their deadline, on a thread of its own. Thread-safe; one for the process."""

    def __init__(self) -> None:
        self._deadlines: dict[int, tuple[Any, float]] = {}
        self._some = threading.Event()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    @contextmanager
    def watching(self, options: Any, deadline: float) -> Iterator[None]:
        """Set `options.terminate`, which ONNX Runtime looks at before every operator, if this lasts until then."""
        self._deadlines[id(options)] = options, deadline
        if not self._some.is_set():
            self._start()
        try:
            yield
        finally:
            del self._deadlines[id(options)]

    def _start(self) -> None:
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._watch, name="onnx-watchdog", daemon=True)
                self._thread.start()
        self._some.set()

    def _watch(self) -> None:
        while True:
            self._some.wait()
            time.sleep(WATCH_S)
            self._some.clear()  # first: a run that begins now sets it again
            for options, deadline in list(self._deadlines.values()):
                self._some.set()
                if time.monotonic() > deadline:
                    options.terminate = True


WATCHDOG = Watchdog()

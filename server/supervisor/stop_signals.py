"""The signals that stop the server: the first one drains, the next one ends it at once.

Runs on the supervisor's event loop.
"""

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Callable

import structlog

from server.logs import STANDARD_ERROR, STANDARD_OUTPUT

REPEAT_S = 0.5  #: a signal that comes again within this is the same wish: `timeout` and others send theirs twice
SIGNALLED = 128  #: plus the signal's number: the exit code of a server that was ended at once, as shells count it
OVERDUE = 1  #: exit code of a server whose end has taken too long

log = structlog.get_logger()


class StopSignals:
    """Listens from its construction on. `told` is set when the server is to drain and end.

    It stops for SIGTERM and SIGINT, and for SIGHUP where the server was started from a terminal, which is then gone.
    Without a terminal SIGHUP is an operator's wish for a reload. Settings are not reloaded, so that it changes nothing.
    """

    def __init__(self) -> None:
        self.told = asyncio.Event()
        self._told_at = 0.0
        self._clean_ups: list[Callable[[], object]] = []
        self._loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._receive, number)
        if os.isatty(0):
            self._loop.add_signal_handler(signal.SIGHUP, self._receive, signal.SIGHUP)
        else:
            self._loop.add_signal_handler(signal.SIGHUP, _ignore_hangup)

    def __repr__(self) -> str:
        """For example `<StopSignals told, 2 clean-ups>`."""
        return f"<StopSignals {'told' if self.told.is_set() else 'waiting'}, {len(self._clean_ups)} clean-ups>"

    def call_at_once(self, clean_up: Callable[[], object]) -> None:
        """Have this called before the process ends at once. It must not wait."""
        self._clean_ups.append(clean_up)

    def limit(self, seconds: float) -> None:
        """End at once should the process still be there after so many seconds."""
        self._loop.call_later(seconds, self._end_at_once, OVERDUE, f"it has not ended within {seconds:g} s")

    def _receive(self, number: signal.Signals) -> None:
        now = time.monotonic()
        if not self.told.is_set():
            self._told_at = now
            self.told.set()
        elif now - self._told_at >= REPEAT_S:
            self._end_at_once(SIGNALLED + number, f"{number.name} came while the server drained")

    def _end_at_once(self, code: int, why: str) -> None:
        log.warning("ended_at_once", why=why)
        for clean_up in self._clean_ups:
            with contextlib.suppress(OSError):  # the others are called nevertheless
                clean_up()
        STANDARD_OUTPUT.flush()
        STANDARD_ERROR.flush()
        os._exit(code)


def _ignore_hangup() -> None:
    log.warning("hangup_ignored", why="settings are read at start alone: SIGTERM drains and stops, then start again")

"""Log lines: text for people on a terminal, JSON for machines, always on standard error.

INVARIANT: logging never decides whether a request is answered. A line is put into a bounded queue and written by a
thread of its own. Where nobody reads standard error, or its reader has gone, lines are dropped and counted
(`fleetcast_log_lines_dropped_total`); the thread that logged goes on at once. Warnings are limited in rate by kind,
because a client can cause them: a made-up model name is a failed load each.
"""

import atexit
import logging
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, MutableMapping
from typing import Any

import structlog

from server.shell.escaping import escape_text

STDOUT, STDERR = 1, 2  #: the descriptors
MAX_LINES, MAX_BYTES = 10_000, 4 * 1024 * 1024  #: that wait for the descriptor
MAX_LINE_BYTES = 64 * 1024  #: of one line; a longer one is cut
FLUSH_S = 1.0  #: how long the end of a process waits for its last lines
BURST, PER_SECOND = 50, 5.0  #: warnings of one kind: so many at once, then so many a second
MAX_KINDS = 1000  #: kinds of warnings whose rate is known; kinds are ours, so there are far fewer


class LineWriter:
    """Writes lines to a descriptor from a thread of its own. `write` never blocks and never fails."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._lines: deque[bytes] = deque()
        self._bytes = 0
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self.dropped = 0  #: lines that found no room, or no reader

    def __repr__(self) -> str:
        """For example `<LineWriter to descriptor 2: 3 lines wait, 0 dropped>`."""
        return f"<LineWriter to descriptor {self._descriptor}: {len(self._lines)} lines wait, {self.dropped} dropped>"

    def write(self, line: str) -> None:
        """Put a line into the queue, or drop it where the queue is full."""
        data = line.encode(errors="backslashreplace")[:MAX_LINE_BYTES] + b"\n"
        with self._changed:
            if len(self._lines) >= MAX_LINES or self._bytes + len(data) > MAX_BYTES:
                self.dropped += 1
                return
            self._lines.append(data)
            self._bytes += len(data)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="log", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def flush(self, timeout_s: float = FLUSH_S) -> bool:
        """Wait until every line is written, or for `timeout_s`. False where some are not."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._lines, timeout_s)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._lines))
                line = self._lines[0]
            written = _write_all(self._descriptor, line)  # this is where a reader that has stopped holds us up
            with self._changed:
                self._lines.popleft()
                self._bytes -= len(line)
                self.dropped += not written
                self._changed.notify_all()


def _write_all(descriptor: int, line: bytes) -> bool:
    """False where the reader has gone, or the disk behind the descriptor is full."""
    while line:
        try:
            line = line[os.write(descriptor, line) :]
        except OSError:
            return False
    return True


class RateLimit:
    """Drops warnings of a kind (their event) that come too fast, and says on the next one how many it dropped.

    A structlog processor. `now` is the monotonic clock.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._kinds: dict[str, tuple[float, float, int]] = {}  # tokens left, when that was, lines dropped since

    def __call__(self, _: object, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        """The event as it is; raises structlog.DropEvent for one too many."""
        if method != "warning":
            return event
        kind, now = str(event.get("event")), self._now()
        left, at, dropped = self._kinds.get(kind, (float(BURST), now, 0))
        left = min(float(BURST), left + (now - at) * PER_SECOND)
        if len(self._kinds) >= MAX_KINDS and kind not in self._kinds:
            self._kinds.clear()
        if left < 1:
            self._kinds[kind] = left, now, dropped + 1
            raise structlog.DropEvent
        self._kinds[kind] = left - 1, now, 0
        if dropped:
            event["not_shown"] = dropped
        return event


class _Logger:
    """What structlog calls with a finished line."""

    def msg(self, line: str) -> None:
        """A line, whatever its level."""
        STANDARD_ERROR.write(line)

    debug = info = warning = error = critical = fatal = exception = log = msg


class _LibraryHandler(logging.Handler):
    """What libraries log by Python's own logging goes the same way; by itself that would write from any thread."""

    def emit(self, record: logging.LogRecord) -> None:
        """One record, as an event that names the library."""
        log = structlog.get_logger()
        log.log(record.levelno, "library", library=record.name, message=record.getMessage(), exc_info=record.exc_info)


STANDARD_ERROR = LineWriter(STDERR)
STANDARD_OUTPUT = LineWriter(STDOUT)  #: of a server: its addresses, and that it stops
atexit.register(STANDARD_ERROR.flush)


def _escape_values(_: object, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """A structlog processor for text: JSON escapes by itself. A traceback keeps its lines."""
    for name, value in event.items():
        if isinstance(value, str):
            event[name] = escape_text(value, "\n" if name == "exception" else "")
        elif not isinstance(value, (int, float, type(None))):
            event[name] = escape_text(str(value))
    return event


def configure_logs(level: str, form: str, **bound: Any) -> None:
    """Set up structlog for this process; `bound` (such as worker=0) is on every line."""
    text = form == "text" or (form == "auto" and sys.stderr.isatty())
    renderer: Any = (
        structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty()) if text else structlog.processors.JSONRenderer()
    )
    structlog.configure(
        processors=[
            RateLimit(),
            lambda _logger, _method, event: {**bound, **event},  # not context variables: threads and callbacks log too
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            *([_escape_values] if text else []),
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=lambda *_: _Logger(),
    )
    logging.basicConfig(handlers=[_LibraryHandler()], level=logging.WARNING, force=True)

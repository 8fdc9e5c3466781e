"""What a child prints, as log lines with the model's name. Bounded: a child that prints more has to wait.

A line is data, never a log line or a metric of ours: it is one field of a line, and control characters are escaped.
"""

import os
import time

import structlog

from model_store.names import ModelName

LINES_PER_S = 50  #: that are logged of one child; more are counted
BYTES_PER_S = 4 * 1024 * 1024  #: that are read of one child; it waits when the pipe is full
MAX_LINE = 2000  #: characters of a line that are logged
READ_BYTES = 64 * 1024
LAST_READS = 4  #: of what a child has said before it ended

log = structlog.get_logger()


class ChildOutput:
    """The reading end of a child's output. `read` is called when there is some; `now`: the monotonic clock (s)."""

    def __init__(self, model: ModelName, descriptor: int) -> None:
        self.descriptor = descriptor
        self.ended = False  #: nothing comes any more
        self._model, self._rest = model, b""
        self._second, self._lines, self._bytes, self._dropped = 0, 0, 0, 0

    def __repr__(self) -> str:
        """For example `<ChildOutput of au/NSW1.mar>`."""
        return f"<ChildOutput of {self._model}>"

    def read(self, now: float) -> bool:
        """Log what there is. False: the child has had its share of this second, or nothing comes any more."""
        self._begin_second(int(now))
        if self._bytes >= BYTES_PER_S:
            return False
        try:
            data = os.read(self.descriptor, READ_BYTES)
        except BlockingIOError:
            return True
        except OSError:
            data = b""
        if not data:
            self.ended = True
            return False
        self._bytes += len(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            self._log(line)
        if len(self._rest) > MAX_LINE:
            self._log(self._rest)
            self._rest = b""
        return True

    def read_last(self) -> None:
        """Log what a child that ends has said, at most LAST_READS pieces."""
        for _ in range(LAST_READS):
            before = self._bytes
            if self.descriptor < 0 or not self.read(time.monotonic()) or self._bytes == before:
                break

    def close(self) -> None:
        """Log what is left, and close the descriptor."""
        if self.descriptor >= 0:
            self.read_last()
            if self._rest:
                self._log(self._rest)
            self._tell_dropped()
            os.close(self.descriptor)
            self.descriptor, self._rest = -1, b""

    def _begin_second(self, second: int) -> None:
        if second != self._second:
            self._tell_dropped()
            self._second, self._lines, self._bytes = second, 0, 0

    def _log(self, line: bytes) -> None:
        if self._lines >= LINES_PER_S:
            self._dropped += 1
            return
        self._lines += 1
        text = line.rstrip(b"\r").decode(errors="backslashreplace")
        if text.strip():
            log.info("code_said", model=self._model, text="".join(map(_escape, text[:MAX_LINE])))

    def _tell_dropped(self) -> None:
        if self._dropped:
            log.info("code_said_more", model=self._model, lines_dropped=self._dropped)
            self._dropped = 0


def _escape(character: str) -> str:
    return character if character.isprintable() or character == "\t" else f"\\x{ord(character):02x}"

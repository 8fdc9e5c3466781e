"""Wakes the event loop from other threads, and holds no lock of the interpreter while it does.

`call_soon_threadsafe` writes to the loop's descriptor while it holds that lock. The write wakes the step thread, which
the system prefers to a thread that is nice: so the step thread ran at once, found the lock taken, and waited for a
thread that had no processor. In a burst of loads a quarter of the time for which loader threads held the lock went
there. A write that releases the lock first costs nothing of that.
"""

import asyncio
import os
from collections.abc import Callable
from contextlib import suppress
from threading import Lock


class Bell:
    """Has the running loop call `answer` after `ring`; once, however often it rings until the loop gets to it."""

    def __init__(self, answer: Callable[[], object]) -> None:
        self._answer = answer
        self._is_rung = False
        self._descriptor = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._closing = Lock()  # so that nobody writes to a descriptor that has become another file's
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._descriptor, self._answer_once)

    def __repr__(self) -> str:
        """For example `<Bell rung>`."""
        return f"<Bell {'closed' if self._descriptor < 0 else 'rung' if self._is_rung else 'silent'}>"

    def ring(self) -> None:
        """Call for an answer, from any thread. INVARIANT: what was done before it is seen by the answer."""
        if not self._is_rung:
            self._is_rung = True
            with self._closing:
                if self._descriptor >= 0:
                    os.eventfd_write(self._descriptor, 1)

    def _answer_once(self) -> None:
        with suppress(BlockingIOError):
            os.eventfd_read(self._descriptor)
        self._is_rung = False  # before the answer looks: who rings from here on has it called again
        self._answer()

    def close(self) -> None:
        """Answer no more. On the loop's thread."""
        with self._closing:
            descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            self._loop.remove_reader(descriptor)
            os.close(descriptor)

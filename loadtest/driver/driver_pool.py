"""Runs one schedule in several driver processes and merges what they measured into one run.

A driver is single-threaded and must wake to the millisecond, so nothing else runs in its process: the progress bar and
the scraping of the server's metrics stay with the caller. The processes start once and take one schedule after another.
They share a start time, because the monotonic clock is the same for all processes of a machine.
"""

import math
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any, Self

import numpy as np

from loadtest.driver.open_loop import LoadTarget, send_schedule
from loadtest.driver.profiles import Schedule
from loadtest.driver.run_result import Run, merge_runs

RATE_OF_ONE = 8_000.0  #: requests/s that one process sends on time with a margin (20,000 were measured on a quiet core)
PEAK_S = 0.25  #: seconds over which the highest rate of a schedule is measured
BOOT_S, HANDOVER_S = 60.0, 0.2


class DriverLost(RuntimeError):
    """A driver process ended unexpectedly."""


def count_drivers(schedule: Schedule) -> int:
    """Return how many processes the peak of the schedule needs, at most one per core."""
    spans = np.bincount((schedule.at / PEAK_S).astype(np.int64), minlength=1)
    wanted = math.ceil(float(spans.max()) / PEAK_S / RATE_OF_ONE)
    return max(1, min(wanted, len(os.sched_getaffinity(0))))


class DriverPool:
    """`size` driver processes for one target. Use it in a `with` statement."""

    def __init__(self, to: LoadTarget, size: int, *, connections: int = 512) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would inherit the threads of what the caller imported
        self._members: list[tuple[Any, Connection]] = []
        for _ in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_run_driver, args=(theirs, to, max(1, connections // size)), daemon=True)
            process.start()
            theirs.close()
            self._members.append((process, ours))

    def __repr__(self) -> str:
        return f"<DriverPool of {len(self._members)}>"

    def __enter__(self) -> Self:
        """Start the processes. Raises DriverLost if one does not start."""
        for _, pipe in self._members:
            if not pipe.poll(BOOT_S):
                raise DriverLost(f"a driver process was not ready within {BOOT_S:g} s")
            self._receive(pipe)
        return self

    def __exit__(self, *_: object) -> None:
        for process, pipe in self._members:
            pipe.close()
            process.terminate()
            process.join()

    def drive(
        self,
        schedule: Schedule,
        *,
        patience_s: float = 10.0,
        every_s: float = 1.0,
        look: Callable[[float], None] = lambda _: None,
    ) -> Run:
        """Send a schedule, calling `look(seconds since its start)` about every `every_s`. Raises DriverLost."""
        start, n = time.monotonic() + HANDOVER_S, len(self._members)
        for k, (_, pipe) in enumerate(self._members):
            part = Schedule(schedule.at[k::n], schedule.model[k::n], schedule.seconds)
            pipe.send((part, patience_s, start))
        parts: dict[Connection, Run] = {}
        due = start + every_s
        while len(parts) < n:
            waiting: list[Any] = [pipe for _, pipe in self._members if pipe not in parts]
            ready: list[Any] = wait(waiting, max(0.0, due - time.monotonic()))
            for pipe in ready:
                parts[pipe] = self._receive(pipe)
            if time.monotonic() >= due:
                look(time.monotonic() - start)
                due = max(due + every_s, time.monotonic())
        return merge_runs(schedule, [parts[pipe] for _, pipe in self._members])

    @staticmethod
    def _receive(pipe: Connection) -> Any:
        try:
            return pipe.recv()
        except EOFError:
            raise DriverLost("a driver process ended before its part of the load did") from None


def _run_driver(pipe: Connection, to: LoadTarget, connections: int) -> None:
    """Run a driver process: receive schedules and send back their runs."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the caller handles Ctrl-C and ends this process
    to.encoding.check()
    pipe.send(None)
    with suppress(EOFError):
        while True:
            schedule, patience_s, start = pipe.recv()
            pipe.send(send_schedule(schedule, to, connections=connections, patience_s=patience_s, start=start))

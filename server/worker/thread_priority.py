"""Loader threads yield to the step thread: they get processor time that it and the fronts leave, and a little more.

A worker may have dozens of loads under way, each on a thread; the system gives each thread that can run the same share
of the cores, so that the step thread would have to queue behind them for each hit. The system knows two ways to say
that a thread matters less: niceness, which leaves it a small share (45 of 1024 parts a thread), and SCHED_IDLE, which
may leave it none. A load that holds the interpreter's lock must go on, or the step waits for it: so it is niceness.

INVARIANT: threads that run requests never inherit this. So what makes threads for them, such as the session of an ONNX
model, is made on a thread of `keep_ordinary_threads`, and code archives are started in a lane that does not yield.
"""

import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Final

NICENESS: Final = 14  #: at 19, loads on busy cores stood still while they held rows of the host cache


def yield_to_others() -> None:
    """Let the calling thread yield, from now on and with all threads that it makes. It cannot be taken back.

    Linux has a niceness for each thread; elsewhere it is the whole process's, and nothing is changed.
    """
    if sys.platform == "linux":
        with suppress(OSError):  # a sandbox's filter: then loads compete with hits as they would without this
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)


def keep_ordinary_threads(name: str, count: int) -> ThreadPoolExecutor:
    """Threads of the caller's own priority. All are made now: later ones would inherit that of who asks for them."""
    pool, all_are_made = ThreadPoolExecutor(count, thread_name_prefix=name), threading.Barrier(count + 1)
    for _ in range(count):
        pool.submit(all_are_made.wait)
    all_are_made.wait()
    return pool

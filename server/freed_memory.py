"""How much freed memory a process keeps for what comes next, where the C library is glibc. Set once, at its start."""

import contextlib
import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # mallopt(3)


def keep_freed_memory(kept_bytes: int, large_bytes: int) -> None:
    """Keep that much of what is freed at the end of the heap, and give blocks of `large_bytes` back at once.

    Of its own accord glibc decides both by the blocks that are freed: up to 32 MiB are no large block then, and a front
    that had read a call of 50 MB kept 5 to 92 MB of it. It may also keep 128 KiB, so that with every call for 1,000
    models the system has to clear 6 to 10 MB of memory anew. Does nothing where the C library has no such call.
    """
    with contextlib.suppress(AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(_M_MMAP_THRESHOLD, large_bytes)
        library.mallopt(_M_TRIM_THRESHOLD, kept_bytes)

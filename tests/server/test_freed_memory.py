"""The memory that a process keeps, as the system counts it."""

import platform
import subprocess
import sys

import pytest

#: Pages that the system clears anew while the memory of a call, in parts of half a megabyte, is taken and freed again.
COUNT_FAULTS = """
import resource
from server.freed_memory import keep_freed_memory

def take(parts):
    held = [b"x" * (500_000 + i) for i in range(parts)]

def count_faults(parts):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    take(parts)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

keep_freed_memory(8 << 20, 1 << 20)
take(8)
few = min(count_faults(8) for _ in range(10))
take(80)
print(few, min(count_faults(80) for _ in range(10)))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_memory_is_kept_for_the_next_call_and_no_more() -> None:
    """4 MB that are freed are there for the next call, without a page from the system; most of 40 MB are given back."""
    found = subprocess.run([sys.executable, "-P", "-c", COUNT_FAULTS], check=True, capture_output=True, text=True)
    few, many = map(int, found.stdout.split())
    assert few < 100
    assert many > 5000

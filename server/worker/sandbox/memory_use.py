"""Measures the memory of a child and of what it has started, from /proc. On any thread of a worker."""

import re
import resource
from pathlib import Path

MAX_PROCESSES = 1024  #: of a child that are measured
_PSS = re.compile(rb"^Pss:\s+(\d+) kB", re.MULTILINE)


def measure_memory(pid: int) -> int:
    """Bytes of the process and its descendants: PSS, in which a page counts as much as it has sharers less.

    Where the kernel does not show that, it is what is resident and not shared. 0 for a process that has ended.
    """
    found, todo = 0, [pid]
    for _ in range(MAX_PROCESSES):
        if not todo:
            break
        each = todo.pop()
        found += _measure_process(each)
        todo += _list_children(each)
    return found


def _measure_process(pid: int) -> int:
    try:
        match = _PSS.search(Path(f"/proc/{pid}/smaps_rollup").read_bytes())
        if match:
            return int(match[1]) * 1024
    except OSError:
        pass
    try:
        _, resident, shared, *_ = map(int, Path(f"/proc/{pid}/statm").read_text().split())
    except (OSError, ValueError):
        return 0
    return (resident - shared) * resource.getpagesize()


def _list_children(pid: int) -> list[int]:
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        return [int(word) for task in tasks for word in (task / "children").read_text().split()]
    except OSError:
        return []

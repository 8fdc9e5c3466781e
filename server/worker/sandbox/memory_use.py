"""Measures what a child takes: memory, with that of what it has started, and the disk. On any thread of a worker."""

import contextlib
import os
import re
import resource
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

MAX_PROCESSES = 1024  #: of a child that are measured
MAX_FILES = 200_000  #: of a folder; one with more is taken for too large
BLOCK = 512  #: bytes that `st_blocks` counts, whatever the file system's own are
REMEASURE_S = 30.0  #: how long the size of a child that does nothing is kept
FEW_PAGES = 64  #: pages that a process touches without being measured again: 256 KiB
_MINOR_FAULTS, _RESIDENT_PAGES = 7, 21  #: in /proc/PID/stat, counted from the field behind the name (proc(5): 10, 24)
Activity = tuple[tuple[int, int, int], ...]  #: of each process its number, page faults and resident pages
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


class MemorySampler:
    """Measures children again and again, on one thread: those that have done nothing meanwhile only now and then.

    To measure a process that shares torch takes 10 ms, to see how many pages it has touched 0.05 ms. A child that
    answers requests touches a few in every second, and is no larger for it. What others do changes how many share a
    page. So what is kept is somewhat too large or too small, for `REMEASURE_S` at most.
    """

    def __init__(self) -> None:
        self._kept: dict[int, tuple[Activity, int, float]] = {}  # child -> what it had done, its size, and until when

    def __repr__(self) -> str:
        """For example `<MemorySampler of 3>`."""
        return f"<MemorySampler of {len(self._kept)}>"

    def measure(self, pids: Iterable[int], now: float) -> dict[int, int]:
        """Bytes of each of these children with what it has started, as `measure_memory`. Others are forgotten."""
        kept: dict[int, tuple[Activity, int, float]] = {}
        for pid in pids:
            activity = _read_activity(pid)
            before = self._kept.get(pid)
            if before is not None and now < before[2] and _is_like(activity, before[0]):
                kept[pid] = before
            else:
                kept[pid] = activity, measure_memory(pid), now + REMEASURE_S
        self._kept = kept
        return {pid: size for pid, (_, size, _) in kept.items()}


def _read_activity(pid: int) -> Activity:
    """Page faults and resident pages of the process and its descendants.

    A page that is written to for the first time faults, so that faults bound what a process has grown by; huge pages,
    of which one fault brings many, are seen in the resident ones.
    """
    found, todo = list[tuple[int, int, int]](), [pid]
    while todo and len(found) < MAX_PROCESSES:
        each = todo.pop()
        try:
            fields = Path(f"/proc/{each}/stat").read_bytes().rpartition(b")")[2].split()
            found.append((each, int(fields[_MINOR_FAULTS]), int(fields[_RESIDENT_PAGES])))
        except (OSError, IndexError, ValueError):
            continue  # it has ended
        todo += _list_children(each)
    return tuple(found)


def _is_like(activity: Activity, before: Activity) -> bool:
    """Whether the same processes have touched few pages since: none of them can have grown by many bytes."""
    if len(activity) != len(before):
        return False
    pairs = zip(activity, before, strict=True)
    return all(
        pid == old and faults - f <= FEW_PAGES and abs(pages - p) <= FEW_PAGES
        for (pid, faults, pages), (old, f, p) in pairs
    )


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
    found: list[int] = []
    with contextlib.suppress(OSError):  # it has ended
        for task in list(Path(f"/proc/{pid}/task").iterdir()):
            with contextlib.suppress(OSError):  # a thread that has ended; what the others have started is still there
                found += map(int, (task / "children").read_text().split())
    return found


def is_folder_larger(folder: Path, most_bytes: int, pid: int = 0) -> bool:
    """Whether the files below the folder take more than so many bytes of disk; with `pid`, its deleted files too.

    Links are not followed. What changes meanwhile counts or does not. It ends early where the answer is known.
    """
    left, files, todo = most_bytes, MAX_FILES, [str(folder)]
    for size in _list_deleted(pid):
        left -= size
    while todo:
        try:
            with os.scandir(todo.pop()) as entries:
                for entry in entries:
                    found = entry.stat(follow_symlinks=False)
                    left -= found.st_blocks * BLOCK
                    files -= 1
                    if left < 0 or files < 0:
                        return True
                    if stat.S_ISDIR(found.st_mode):
                        todo.append(entry.path)
        except OSError:
            continue  # gone meanwhile, or closed to us by its owner, who is not root
    return left < 0


def _list_deleted(pid: int) -> Iterator[int]:
    """Bytes of files that the process has open and has deleted."""
    if not pid:
        return
    try:
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            found = descriptor.stat()
            if stat.S_ISREG(found.st_mode) and found.st_nlink == 0:
                yield found.st_blocks * BLOCK
    except OSError:
        return  # the process has ended

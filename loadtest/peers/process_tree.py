"""The processes of a server: leaders and all descendants, seen through /proc, started and ended. Linux."""

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from loadtest.observe.processes import read_pss

TICKS = os.sysconf("SC_CLK_TCK")
GENTLE_S = 10.0
KILL_S = 20.0
#: errors of a process that has ended meanwhile
GONE = (FileNotFoundError, ProcessLookupError, PermissionError, IndexError)


class ProcessTree:
    """Leaders and all their descendants, also those that left the leaders' process group (Ray's daemons)."""

    def __init__(self, *leaders: int) -> None:
        self._seen = {
            pid: int(_read_stat(pid)[19]) for pid in leaders
        }  # with start time: pids are reused, the pair is not

    def __repr__(self) -> str:
        return f"<ProcessTree of {len(self.pids())} processes>"

    def pids(self) -> list[int]:
        """The pids of all live processes; one that was seen once is followed after its parent has ended."""
        children: dict[int, list[int]] = {}
        starts = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with suppress(*GONE):
                    state, parent, *fields = _read_stat(int(entry.name))
                    if state != "Z":
                        starts[int(entry.name)] = int(fields[17])
                        children.setdefault(int(parent), []).append(int(entry.name))
        known = [pid for pid, start in self._seen.items() if starts.get(pid) == start]
        self._seen = {}
        while known:
            pid = known.pop()
            if pid not in self._seen:
                self._seen[pid] = starts[pid]
                known += children.get(pid, [])
        return sorted(self._seen)

    def memory(self) -> int:
        """The proportional set size of all processes in bytes."""
        total = 0
        for pid in self.pids():
            with suppress(*GONE):
                total += read_pss(pid)
        return total

    def cpu_s(self) -> float:
        """The CPU seconds of the live processes."""
        total = 0
        for pid in self.pids():
            with suppress(*GONE):
                fields = _read_stat(pid)
                total += int(fields[11]) + int(fields[12])
        return total / TICKS

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to every process."""
        for pid in self.pids():
            with suppress(*GONE):
                os.kill(pid, number)

    def kill(self) -> None:
        """Kill all processes and wait for their end. Raises RuntimeError when that takes longer than KILL_S."""
        until = time.monotonic() + KILL_S
        while self.pids():
            if time.monotonic() > until:
                raise RuntimeError(f"processes {self.pids()} cannot be ended")
            self.signal(signal.SIGKILL)
            time.sleep(0.02)


@contextmanager
def start_process(
    command: Sequence[str], folder: Path, environment: Mapping[str, str]
) -> Iterator[tuple[ProcessTree, Path]]:
    """Start a process in a new session; yields its tree and its log. At the end it gets SIGTERM, the rest SIGKILL."""
    path = folder / "log.txt"
    with path.open("wb") as log:
        leader = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    tree = ProcessTree(leader.pid)
    try:
        yield tree, path
    finally:
        tree.signal(signal.SIGCONT)  # a stopped process would not handle SIGTERM
        leader.terminate()
        with suppress(subprocess.TimeoutExpired):
            leader.wait(GENTLE_S)
        tree.kill()
        leader.wait()


def read_log_end(log: Path) -> str:
    """Read the end of the output of a process."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return " | ".join(lines[-3:])[-400:]


def _read_stat(pid: int) -> list[str]:
    """Read /proc/PID/stat from the state on: 0 state, 1 parent, 11 and 12 processor time, 19 start time."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()

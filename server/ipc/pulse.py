"""The memory that a worker shares with the fronts and the supervisor: that its step loop turns, how its loads fare, and
which models it runs at this moment.

The worker alone writes it, in about a microsecond and without a lock; whoever has it mapped reads it without asking the
worker, also when that is stopped or dead. It is memory without a file, so no disk can make a write wait. A link in the
folder of the sockets leads to it. Each field has one writing thread at a time.
"""

import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from struct import Struct
from typing import Final, Literal, NamedTuple

SUFFIX: Final = ".run"  #: behind the path of the worker's socket
MAX_NAME_BYTES: Final = 4096  #: of a model's name of 1024 characters
SEATS: Final = 272  #: models that are loaded or run apart at the same time: more than there are threads for them
BATCH_BYTES: Final = 256 * 1024  #: of the names of the models of one batch; of a longer list the end is not noted
SILENT_S: Final = 1.0  #: a step loop that has not beaten for so long is silent: fronts ask other workers
LONGEST_TICK_S: Final = 0.5  #: the most of an observer's own pause that counts as silence of the one that it observes

_HEAD = Struct("<QII")  # beats; milliseconds of stuck loader threads; milliseconds since the store has failed
_SEAT_BYTES = MAX_NAME_BYTES + 2  # how it runs, the name, a zero
_BATCH_AT = 64 + SEATS * _SEAT_BYTES
_BYTES = _BATCH_AT + BATCH_BYTES
_MOST_MS = 2**32 - 1

How = Literal["batch", "alone", "load"]
_LETTERS: dict[How, bytes] = {"batch": b"b", "alone": b"a", "load": b"l"}
_HOWS: dict[bytes, How] = {letter: how for how, letter in _LETTERS.items()}


class RunningModel(NamedTuple):
    """A model and how it runs: in a batch of rows, alone or apart, or still being loaded."""

    model: str
    how: How


class LoadSigns(NamedTuple):
    """For how many seconds all loader threads have been stuck, and since when the store has failed; 0: neither."""

    stuck_s: float
    store_gone_s: float


class Pulse:
    """The worker's side. `path`: of the link to it; without one nobody else reads it."""

    def __init__(self, path: str = "") -> None:
        descriptor = os.memfd_create("fleetcast-pulse")
        os.ftruncate(descriptor, _BYTES)
        self._memory = mmap.mmap(descriptor, _BYTES)
        self._path, self._descriptor = path, descriptor
        if path:
            self.link()
        else:
            os.close(descriptor)
        #: The names of the models of the running batch of rows, separated by newlines and ended by a zero byte. Row
        #: batches write it in place, on the step thread: a zero in front says that none runs.
        self.batch = memoryview(self._memory)[_BATCH_AT:]
        self._beats = 0
        self._free = [64 + seat * _SEAT_BYTES for seat in range(SEATS)]

    def __repr__(self) -> str:
        """For example `<Pulse 12 beats, 1 models noted>`."""
        return f"<Pulse {self._beats} beats, {SEATS - len(self._free)} models noted>"

    def link(self) -> None:
        """Make the link to it, unless it is there: its folder may have been removed, and made anew."""
        if not os.path.lexists(self._path):
            Path(self._path).symlink_to(f"/proc/{os.getpid()}/fd/{self._descriptor}")

    def beat(self, signs: LoadSigns) -> None:
        """The step loop has turned."""
        self._beats += 1
        stuck, gone = (min(_MOST_MS, int(seconds * 1e3)) for seconds in signs)
        _HEAD.pack_into(self._memory, 0, self._beats, stuck, gone)

    @contextmanager
    def noting(self, model: str, how: How) -> Iterator[None]:
        """The model runs, or is loaded, inside. On any thread."""
        try:
            at = self._free.pop()
        except IndexError:  # more threads than seats: what runs is not known, and runs nevertheless
            yield
            return
        name = _LETTERS[how] + model.encode()[:MAX_NAME_BYTES] + b"\0"
        self._memory[at : at + len(name)] = name
        try:
            yield
        finally:
            self._memory[at] = 0
            self._free.append(at)


class PulseReader:
    """What a front and the supervisor see of a worker; it stays readable when the worker is dead."""

    def __init__(self, path: str) -> None:
        """Raises OSError where there is none."""
        with open(path, "rb") as file:  # noqa: PTH123 -- the link's target has no other name
            self._memory = mmap.mmap(file.fileno(), _BYTES, prot=mmap.PROT_READ)
        self._beats = -1
        self._seen = 0.0
        self.silent_s = 0.0

    def __repr__(self) -> str:
        """For example `<PulseReader silent for 0.2 s>`."""
        return f"<PulseReader silent for {self.silent_s:.1f} s>"

    @property
    def is_silent(self) -> bool:
        """Whether the step loop has not turned for SILENT_S, when `observe` looked last."""
        return self.silent_s >= SILENT_S

    def observe(self, now: float) -> float:
        """Look at the beats; for how many seconds there have been no new ones. `now`: the monotonic clock in seconds.

        Silence is counted in the observer's own looks. A machine that slept, or an observer that was stopped itself,
        takes no worker for a silent one.
        """
        (beats, *_) = _HEAD.unpack_from(self._memory)
        if beats != self._beats:
            self._beats, self.silent_s = beats, 0.0
        else:
            self.silent_s += min(now - self._seen, LONGEST_TICK_S)
        self._seen = now
        return self.silent_s

    def load_signs(self) -> LoadSigns:
        """How the loads fared at the last beat."""
        _, stuck, gone = _HEAD.unpack_from(self._memory)
        return LoadSigns(stuck / 1e3, gone / 1e3)

    def running(self) -> list[RunningModel]:
        """What runs at this moment, or ran when the worker died."""
        found = [RunningModel(name, "batch") for name in self._text(_BATCH_AT, BATCH_BYTES).split("\n") if name]
        for seat in range(SEATS):
            text = self._text(64 + seat * _SEAT_BYTES, _SEAT_BYTES)
            if text:
                found.append(RunningModel(text[1:], _HOWS[text[:1].encode()]))
        return found

    def _text(self, at: int, size: int) -> str:
        end = self._memory.find(b"\0", at, at + size)
        return self._memory[at : at + size if end < 0 else end].decode(errors="ignore")

"""Writes archives into a store, several at a time. It overwrites only if told to, and continues an interrupted run."""

from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from rich.console import Console

from model_store.names import ModelName
from model_store.stores.object_store import Source, open_source
from server.shell.progress import TaskList

WRITERS, AHEAD = 16, 48  #: threads that write, and most archives that wait for them

console = Console(highlight=False, soft_wrap=True)


class StoreOccupied(Exception):
    """The store has objects that are not of this fleet, and overwriting was not allowed explicitly."""


@dataclass(slots=True)
class WriteCounts:
    """The written archives of a fleet by kind (number, bytes), and how many were there already."""

    kinds: dict[str, tuple[int, int]] = field(default_factory=dict)
    kept: int = 0

    def count(self, kind: str, size: int, *, kept: bool) -> None:
        """Count one more archive."""
        archives, bytes_ = self.kinds.get(kind, (0, 0))
        self.kinds[kind] = archives + 1, bytes_ + size
        self.kept += kept


@dataclass(frozen=True, slots=True)
class ReadyArchive:
    """An archive that is ready to be written."""

    name: ModelName
    kind: str
    data: bytes


def write_archives(
    where: str, names: set[ModelName], archives: Iterable[ReadyArchive], tasks: TaskList, *, over: bool = False
) -> WriteCounts:
    """Write archives of these names into a folder (created if missing) or a store URL, while `archives` makes them.

    An existing archive is fetched and compared; one with the same bytes is kept, so that an interrupted run continues.
    A different archive under one of the names, or any other key, raises StoreOccupied unless `over`; other keys are
    never changed. Raises LoadError and InvalidStoreUrl for the store.
    """
    if "://" not in where:
        Path(where).mkdir(parents=True, exist_ok=True)
    source, found = open_source(where), WriteCounts()
    there = _list_existing(source, where, names, over=over)
    task = tasks.start_task("writing archives", len(names))
    pending: deque[tuple[ReadyArchive, Future[bool]]] = deque()

    def settle(most: int) -> None:
        while len(pending) > most:
            made, kept = pending.popleft()
            found.count(made.kind, len(made.data), kept=kept.result())
            task.advance()

    with ThreadPoolExecutor(WRITERS, "writer") as pool:
        write = partial(_write_archive, source, where, over=over)
        for made in archives:
            pending.append((made, pool.submit(write, made, there=made.name in there)))
            settle(AHEAD)
        settle(0)
    return found


def _list_existing(source: Source, where: str, names: set[ModelName], *, over: bool) -> set[ModelName]:
    """Return the names that the store has. Raises StoreOccupied at the first other key, unless `over`."""
    there = set()
    for listed in source.list():
        if listed.name in names:
            there.add(listed.name)
        elif not over:
            raise StoreOccupied(
                f"{where} has {listed.name}, which is not of this fleet: choose an empty place, or --over"
            )
    return there


def _write_archive(source: Source, where: str, made: ReadyArchive, *, over: bool, there: bool) -> bool:
    """Write one archive, in a thread. Returns True if the same bytes were there already."""
    if there:
        found = source.get(made.name)
        assert found is not None, "only a conditional GET is answered `not modified`"
        if found.data == made.data:
            return True
        if not over:
            why = "of another seed, other families or another version"
            raise StoreOccupied(f"{made.name} in {where} is another archive, {why}: choose an empty place, or --over")
    source.put(made.name, made.data)
    return False

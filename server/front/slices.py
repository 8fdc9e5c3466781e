"""Long work in a front, cut into slices so that the event loop serves others in between.

A function that may work long is a generator of the work it has done since its last yield, in bytes of text or what
takes as long; its value is what it returns. Pure functions are written so, and know no event loop.
"""

import asyncio
from collections.abc import Generator, Iterable, Sequence
from typing import TypeVar, cast

T = TypeVar("T")
Slices = Generator[int, None, T]

UNIT = 32 * 1024  #: bytes of work that a generator does between two yields, if it can stop there; 0.1 to 2 ms
AT_ONCE = 4 * UNIT  #: bytes that msgspec is given at once; it cannot stop, and takes up to 10 ns for a byte
SLICE = 2 * UNIT  #: bytes of work after which other tasks get their turn
COPIED = 64 * UNIT  #: bytes that are copied in the time of one unit
PART = 128  #: what it counts to append one part, beside its bytes
ITEM = 2 * 1024  #: what it counts to handle one of many small things, beside its bytes


class Pacer:
    """Counts work, and lets the loop's other tasks run after each slice of it."""

    def __init__(self) -> None:
        self._spent = 0

    def __repr__(self) -> str:
        """For example `<Pacer 1000 bytes since the last turn>`."""
        return f"<Pacer {self._spent} bytes since the last turn>"

    async def spend(self, work: int) -> None:
        """Count work that is done."""
        self._spent += work
        if self._spent >= SLICE:
            self._spent = 0
            await asyncio.sleep(0)

    async def run(self, slices: Slices[T]) -> T:
        """The value of a function that works in slices."""
        while True:
            try:
                self._spent += next(slices)
            except StopIteration as end:
                value: T = end.value
                return value
            if self._spent >= SLICE:
                await self.spend(0)


def finish_slices(slices: Slices[T]) -> T:
    """The value without a pause, where no event loop waits."""
    while True:
        try:
            next(slices)
        except StopIteration as end:
            value: T = end.value
            return value


def join_few(parts: Sequence[bytes | bytearray | memoryview]) -> Slices[bytes]:
    """Parts in one buffer: at once where they are so few and small that this is one unit of work."""
    if sum(map(len, parts)) + PART * len(parts) > COPIED:
        return (yield from join_parts(parts))  # type: ignore[arg-type]  # it takes any buffer
    yield UNIT
    return b"".join(parts)


def join_parts(parts: Iterable[bytes | memoryview]) -> Slices[bytes]:
    """All parts in one buffer, which grows with them: memory for tens of megabytes at once takes as many ms."""
    joined, work = bytearray(), 0
    for part in parts:
        if len(part) <= UNIT:
            joined += part
        else:
            view = memoryview(part)
            for at in range(0, len(view), UNIT):
                joined += view[at : at + UNIT]
                yield UNIT
        work += len(part) % UNIT + PART
        if work >= UNIT:
            yield work
            work = 0
    return cast("bytes", joined)  # not copied: all that read it take any buffer

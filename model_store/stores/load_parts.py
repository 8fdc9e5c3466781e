"""The parts of a load and how long each took: whoever runs a load listens, and what does the work says it.

A load goes through threads and folders that know nothing of each other, so that the listener is a variable of the
context: it is there while a step of the load runs, and nowhere else. Where nobody listens nothing is noted.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from model_store.stores.load_part import LoadPart

MOST_PARTS, MAX_ERROR = 16, 512  #: of a load, and characters of why a part failed


@dataclass(slots=True)
class LoadParts:
    """The parts of one load in the order in which they began: the first MOST_PARTS of them."""

    parts: list[LoadPart] = field(default_factory=list)
    _open: list[str] = field(default_factory=list)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """What this thread does in a `with` block is this load's."""
        token = _listener.set(self)
        try:
            yield
        finally:
            _listener.reset(token)
            self._open.clear()

    @contextmanager
    def timing(self, name: str) -> Iterator[LoadPart]:
        """Time a part, which is one of those that are open. What is raised within is its error."""
        self._open.append(name)
        part = LoadPart(".".join(self._open), time.monotonic())
        if len(self.parts) < MOST_PARTS:
            self.parts.append(part)
        try:
            yield part
        except Exception as error:
            part.error = f"{type(error).__name__}: {error}"[:MAX_ERROR]
            raise
        finally:
            part.ended = time.monotonic()
            if self._open:
                self._open.pop()


_listener: ContextVar[LoadParts | None] = ContextVar("load_parts", default=None)


@contextmanager
def timing_part(name: str) -> Iterator[LoadPart]:
    """Time a part of the load that runs on this thread, if one does. The yielded part takes the `size`."""
    listener = _listener.get()
    if listener is None:
        yield LoadPart(name, 0.0)
        return
    with listener.timing(name) as part:
        yield part

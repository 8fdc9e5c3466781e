"""The processes of one loaded code archive: one, or several where a client has scaled it. On the step thread.

Each answers one batch at a time, and knows nothing of the others.
"""

import asyncio

from server.code_messages import HandlerLoaded
from server.worker.sandbox.child_process import ChildProcess

LEND_AFTER = 3  #: requests in a row from one front, at first


class Replicas:
    """See the module. INVARIANT: one is listed at least; the last one stays listed when it has ended, and says why."""

    def __init__(self, first: ChildProcess) -> None:
        self.children = [first]
        self.wanted = 1  #: how many there should be
        self.starts: set[asyncio.Task[None]] = set()  #: of those that are started now
        self.asked_by: object = None  #: the front whose requests were answered last
        self.asked = 0  #: how many of them in a row
        self.lend_after = LEND_AFTER  #: so many in a row, and a front may ask the one child itself
        self.not_before = 0.0  #: monotonic; no further one is started before this time
        self._leaving: list[ChildProcess] = []  # that were closed and may not be gone yet

    def __repr__(self) -> str:
        """For example `<Replicas [<ChildProcess 4711 of au/NSW1.mar>]>`."""
        return f"<Replicas {self.children!r}>"

    @property
    def loaded(self) -> HandlerLoaded:
        """What the handler said when it was loaded."""
        return self.children[0].loaded

    @property
    def ended(self) -> str:
        """Why all have ended; empty while one lives."""
        return self.children[0].ended

    @property
    def is_short(self) -> bool:
        """Whether there should be more."""
        return len(self.children) + len(self.starts) < self.wanted

    @property
    def charge(self) -> int:
        """Bytes of all, as measured last."""
        return sum(child.charge for child in self.children)

    def find_idle(self) -> ChildProcess | None:
        """One that can be given a batch now. One that has ended is told so by it."""
        return next((child for child in self.children if not child.is_busy), None)

    def drop(self, child: ChildProcess) -> bool:
        """Forget a child that has ended by itself. False if it was the only one, which stays listed."""
        if len(self.children) == 1:
            return False
        self.children.remove(child)
        self._close(child)
        return True

    def end_surplus(self) -> bool:
        """End idle children beyond the wanted number; busy ones stay for now. True if one was ended."""
        before = len(self.children)
        while len(self.children) > self.wanted and self.end_idle():
            pass
        return len(self.children) < before

    def end_idle(self) -> bool:
        """End one child that is idle, but never the last one. False if there is none."""
        idle = next((child for child in reversed(self.children) if not child.is_busy), None)
        if idle is None or len(self.children) == 1:
            return False
        self.children.remove(idle)
        self._close(idle)
        return True

    def close(self) -> None:
        """End all. One that is being started is ended as soon as it has started."""
        for child in self.children:
            child.close()

    async def wait_settled(self) -> None:
        """Wait until none is being started, and those that were ended before are gone."""
        while self.starts:
            await asyncio.wait(set(self.starts))
        while self._leaving:  # others may leave meanwhile
            await self._leaving.pop().wait_gone()

    async def wait_gone(self) -> None:
        """Wait until all are gone, after `close`."""
        await self.wait_settled()
        for child in self.children:
            await child.wait_gone()

    def _close(self, child: ChildProcess) -> None:
        child.close()
        self._leaving = [*(each for each in self._leaving if not each.is_gone), child]

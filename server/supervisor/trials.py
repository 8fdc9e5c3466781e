"""Permits suspects to run, one at a time. A suspect is a model that ran when a worker died. Runs in the supervisor."""

import asyncio
from collections.abc import Callable

import structlog

from server.errors import describe_quarantine
from server.supervisor.quarantine import ServerQuarantine

SPARE_S = 2.0  #: how long a trial waits for a second worker, which serves the others should the first die
EXPIRY_S = 2.0  #: beyond its deadline, after which a trial whose end nobody has told is over

log = structlog.get_logger()


class Trials:
    """See the module. `count_ready`: workers that are ready now; `workers`: how many the server has."""

    def __init__(self, quarantine: ServerQuarantine, count_ready: Callable[[], int], workers: int) -> None:
        self._quarantine, self._count_ready, self._wanted = quarantine, count_ready, min(2, workers)
        self._changed = asyncio.Event()
        self._holder = ""  # the front whose trial runs
        self._expiry: asyncio.TimerHandle | None = None
        self.model = ""  #: on trial; empty: none
        self.lost = -1  #: the worker of whose end the verdict is awaited

    def __repr__(self) -> str:
        """For example `<Trials a.mar>`."""
        return f"<Trials {self.model or 'none'}>"

    async def begin(self, holder: str, model: str, for_s: float) -> str:
        """Empty when the front `holder` may run the model now, else why not. Raises TimeoutError after `for_s`."""
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(for_s):
            spare_until = loop.time() + SPARE_S
            while model not in self._quarantine.reasons:
                wanted = self._wanted if loop.time() < spare_until else 1
                if not self.model and self._count_ready() >= wanted:
                    self._holder, self.model = holder, model
                    self._expiry = loop.call_later(for_s + EXPIRY_S, self._end)
                    log.info("suspect_tried", model=model, front=holder)
                    return ""
                await self._wait_for_change(max(0.02, spare_until - loop.time()) if wanted > 1 else None)
        return describe_quarantine(model, self._quarantine.reasons[model])

    def end(self, holder: str, model: str, lost: int) -> None:
        """The front's trial has ended. `lost`: a worker that died of it and is still thought to be up, or -1."""
        if (holder, model) == (self._holder, self.model):
            self.lost = lost
            if lost < 0:
                self._end()

    def note_worker(self, worker: int) -> None:
        """The worker has come up, has ended and the quarantine knows, or beats again."""
        if worker == self.lost:
            self._end()
        self._tell()

    def note_front_end(self, front: str) -> None:
        """The front is gone."""
        if front == self._holder:
            self._end()

    def note_quarantine(self) -> None:
        """Some model has come into quarantine."""
        self._tell()

    def _end(self) -> None:
        if self._expiry is not None:
            self._expiry.cancel()
        self._holder, self.model, self.lost, self._expiry = "", "", -1, None
        self._tell()

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _wait_for_change(self, most_s: float | None) -> None:
        try:
            async with asyncio.timeout(most_s):
                await self._changed.wait()
        except TimeoutError:
            pass

"""Permits suspects to run, one at a time. A suspect is a model that ran when a worker died. Runs in the supervisor."""

import asyncio
from collections import Counter
from collections.abc import Callable

import structlog

from server.errors import describe_quarantine
from server.supervisor.quarantine import ServerQuarantine

SPARE_S = 2.0  #: how long a trial waits for a second worker, which serves the others should the first die
CRASH_SPARE_S = 10.0  #: the same where a worker has died of its own while the model ran: longer than a start takes
NEWS_S = 0.5  #: by when the supervisor knows of a death or silence that a front has seen
EXPIRY_S = 2.0  #: beyond its deadline, after which a trial whose end nobody has told is over

log = structlog.get_logger()


class Trials:
    """See the module. `find_ready`: the workers that are ready now; `workers`: how many the server has."""

    def __init__(self, quarantine: ServerQuarantine, find_ready: Callable[[], set[int]], workers: int) -> None:
        self._quarantine, self._find_ready, self._wanted = quarantine, find_ready, min(2, workers)
        self._news: Counter[int] = Counter()  # of each worker, how often something was noted
        self._changed = asyncio.Event()
        self._holder = ""  # the front whose trial runs
        self._expiry: asyncio.TimerHandle | None = None
        self.model = ""  #: on trial; empty: none
        self.lost = -1  #: the worker of whose end the verdict is awaited

    def __repr__(self) -> str:
        """For example `<Trials a.mar>`."""
        return f"<Trials {self.model or 'none'}>"

    async def begin(self, holder: str, model: str, for_s: float, lost: int = -1) -> str:
        """Empty when the front `holder` may run the model now, else why not. Raises TimeoutError after `for_s`.

        `lost`: the worker that the front has just lost, and that is not counted before there is news of it: the front
        may know of the death before the supervisor does.
        """
        loop = asyncio.get_running_loop()
        began, known = loop.time(), self._news[lost]
        async with asyncio.timeout(for_s):
            while model not in self._quarantine.reasons:
                spare_until = began + self._measure_patience(model, for_s)
                wanted = self._wanted if loop.time() < spare_until else 1
                ready = self._find_ready()
                is_news_due = lost in ready and self._news[lost] == known and loop.time() < began + NEWS_S
                if is_news_due:
                    ready = ready - {lost}
                if not self.model and len(ready) >= wanted:
                    self._holder, self.model = holder, model
                    self._expiry = loop.call_later(for_s + EXPIRY_S, self._end)
                    log.info("suspect_tried", model=model, front=holder)
                    return ""
                until = began + NEWS_S if is_news_due else spare_until
                await self._wait_for_change(max(0.02, until - loop.time()) if is_news_due or wanted > 1 else None)
        return describe_quarantine(model, self._quarantine.reasons[model])

    def _measure_patience(self, model: str, for_s: float) -> float:
        """How long the model's trial waits for a second worker.

        Where no worker has died of its own, one was killed or stopped, and the model is most likely innocent: it runs
        within its request's deadline, though that be short.
        """
        return CRASH_SPARE_S if self._quarantine.is_blamed(model) else min(SPARE_S, for_s / 2)

    def end(self, holder: str, model: str, lost: int) -> None:
        """The front's trial has ended. `lost`: a worker that died of it and is still thought to be up, or -1."""
        if (holder, model) == (self._holder, self.model):
            self.lost = lost
            if lost < 0:
                self._end()

    def note_worker(self, worker: int) -> None:
        """The worker has come up, has ended and the quarantine knows, or beats again."""
        self._news[worker] += 1
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

"""Work that a front goes on with when its client has its answer already. Runs in a front, on its event loop.

A front that is told to stop gives such work a time to end, and then cancels it: each job says what became of it.
"""

import asyncio
from collections.abc import Coroutine

from server.errors import Refused, Situation

LAST_WORDS_S = 5.0  #: in which jobs that were cancelled may say so


class BackgroundJobs:
    """The jobs of one front. `grace_s`: how long they may go on once the front is told to stop."""

    def __init__(self, grace_s: float = 0.0) -> None:
        self._grace_s = grace_s
        self._jobs: set[asyncio.Task[None]] = set()
        self._stopping: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        """For example `<BackgroundJobs 12 under way>`."""
        return f"<BackgroundJobs {len(self._jobs)} under way>"

    @property
    def is_stopping(self) -> bool:
        """Whether the front was told to stop."""
        return self._stopping is not None

    def check(self) -> None:
        """Raises Refused where no job may start, because the front stops. Whoever starts jobs bounds their number."""
        if self._stopping is not None:
            raise Refused(Situation.NOT_READY, "the server is stopping; try again")

    def start(self, job: Coroutine[None, None, None]) -> None:
        """Run a job, for which there is room by `check`. It catches its own errors and, once, its cancellation."""
        task = asyncio.ensure_future(job)
        self._jobs.add(task)
        task.add_done_callback(self._jobs.discard)

    def stop(self, grace_s: float | None = None) -> None:
        """Start no further job, and cancel those that still run when the time is over. The first call decides."""
        if self._stopping is None:
            grace = self._grace_s if grace_s is None else grace_s
            self._stopping = asyncio.ensure_future(self._end_jobs(grace))

    async def wait_ended(self) -> None:
        """Until all jobs have ended after `stop`, or have not in time."""
        if self._stopping is not None:
            await self._stopping

    async def _end_jobs(self, grace_s: float) -> None:
        if self._jobs:
            _, late = await asyncio.wait(self._jobs, timeout=grace_s)
            for task in late:
                task.cancel()
            if late:
                await asyncio.wait(late, timeout=LAST_WORDS_S)

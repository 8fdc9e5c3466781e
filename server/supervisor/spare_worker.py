"""A worker process that is started ahead, so that a worker that has died is replaced without importing anything.

It knows nothing of the server but the descriptors of all workers' rows: it asks what it is to be, and is answered when
it takes the place of a worker. Runs on the supervisor's event loop.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import structlog

from server.ipc.control import ControlChannel

if TYPE_CHECKING:
    from server.supervisor.children import Child

AHEAD_S = (
    5.0  #: after all workers are up, until the next spare starts: its imports are not to delay their first answers
)
BACK_OFF_S = (5.0, 300.0)  #: after a spare that has ended by itself

log = structlog.get_logger()


class StartedProcess(NamedTuple):
    """A child process, its channel, and the task that serves the channel."""

    process: asyncio.subprocess.Process
    channel: ControlChannel
    served: "asyncio.Task[None]"


#: Starts the process of the child that the callable gives when it is first asked something.
StartProcess = Callable[["Child", Callable[[], "Awaitable[Child]"]], Awaitable[StartedProcess]]


class SpareWorker:
    """Keeps one spare for workers like `model`. `are_up`: whether no worker is starting."""

    def __init__(self, model: "Child", start: StartProcess, are_up: Callable[[], bool]) -> None:
        self._model, self._start, self._are_up = model, start, are_up
        self._spare: StartedProcess | None = None
        self._claimed: asyncio.Future[Child] = asyncio.get_running_loop().create_future()
        self._waiting: int | None = None  # the spare process that has imported everything

    def __repr__(self) -> str:
        """For example `<SpareWorker pid 4711>`."""
        return f"<SpareWorker {'none' if self.pid is None else f'pid {self.pid}'}>"

    @property
    def pid(self) -> int | None:
        """Its process; None while there is none."""
        spare = self._spare
        return None if spare is None or spare.process.returncode is not None else spare.process.pid

    @property
    def is_waiting(self) -> bool:
        """Whether it has imported and tried everything, so that it can take a worker's place at once."""
        return self.pid is not None and self._waiting == self.pid

    def claim(self, child: "Child") -> StartedProcess | None:
        """Let the spare be this worker from now on; None where there is no spare that can be."""
        spare, plan, like = self._spare, child.plan, self._model.plan
        if spare is None or self.pid is None or plan is None or like is None:
            return None
        if (plan.device, plan.threads) != (like.device, like.threads):
            return None
        self._spare = None
        self._claimed.set_result(child)
        return spare

    async def keep(self) -> None:
        """Have a spare whenever all workers are up. Runs until it is cancelled."""
        first, longest = BACK_OFF_S
        pause = first
        while True:
            await asyncio.sleep(AHEAD_S)
            if not self._are_up():
                continue
            self._claimed = claimed = asyncio.get_running_loop().create_future()
            spare = self._spare = await self._start(self._model, partial(self._await_claim, claimed))
            ended = asyncio.create_task(spare.process.wait())
            await asyncio.wait([ended, claimed], return_when=asyncio.FIRST_COMPLETED)
            if claimed.done():
                pause = first
                continue
            log.warning("spare_ended", code=spare.process.returncode, again_in_s=pause)
            await asyncio.sleep(pause)
            pause = min(longest, 2 * pause)

    def kill(self) -> None:
        """Kill it: it serves nobody."""
        if self._spare is not None and self._spare.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._spare.process.kill()

    async def end(self) -> None:
        """Kill it and wait until it is gone."""
        self.kill()
        if self._spare is not None:
            await self._spare.process.wait()
            await self._spare.served

    def _await_claim(self, claimed: "asyncio.Future[Child]") -> "asyncio.Future[Child]":
        """The spare asks what it is to be: that is the first thing that it asks, and the last before it serves."""
        self._waiting = self.pid
        return claimed

"""Models that ran when a worker died or fell silent: their requests run one at a time, on all fronts together.

A suspect's request is sent alone, in a batch of its own, once the supervisor permits it. An answer clears the model at
this front. If another worker dies of it, the supervisor puts the model into quarantine, and all that wait are refused.
Runs on a front's event loop.
"""

import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import structlog

from model_store.name_table import NameTable
from server.contract import MIB
from server.errors import Refused, Situation
from server.ipc.control import ChannelClosed, ControlChannel, ControlError
from server.ipc.operations import EndTrial, TrySuspect

MAX_SUSPECT_BYTES = MIB  #: of the suspects' names: beyond, the oldest are suspects no more
LOGGED = 20  #: names in one line of the log

log = structlog.get_logger()


class Suspects:
    """See the module. Without a channel (a front that has no supervisor) every trial is permitted."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self.channel: ControlChannel | None = None
        self._now = now
        self._models: NameTable[None] = NameTable(MAX_SUSPECT_BYTES)
        self.has = self._models.has

    def __repr__(self) -> str:
        """For example `<Suspects 2 models>`."""
        return f"<Suspects {len(self._models)} models>"

    def __len__(self) -> int:
        return len(self._models)

    def add(self, models: set[str], worker: int) -> None:
        """These ran when the worker was lost."""
        if not models:
            return
        log.warning("suspects", worker=worker, models=sorted(models)[:LOGGED], count=len(models))
        for model in models:
            self._models.put(model, None)

    def clear(self, model: str) -> None:
        """The model has answered alone."""
        self._models.pop(model)

    @asynccontextmanager
    async def trying(self, model: str, deadline: float, lost: int | None = None) -> AsyncIterator["Trial"]:
        """The supervisor's permission to run the suspect. Raises Refused when it is in quarantine, or not in time.

        `lost`: the worker that was lost with the request, of which the supervisor may not know yet.
        """
        trial = Trial(model)
        if self.channel is None:
            yield trial
            return
        left_s = deadline - self._now()
        try:
            asked = TrySuspect(model, max(0.0, left_s), -1 if lost is None else lost)
            why = await self.channel.ask(asked, max(0.0, left_s))
        except TimeoutError:
            message = f"a worker died while {model} ran; the deadline passed before it could be tried alone"
            raise Refused(Situation.DEADLINE, message) from None
        except (ControlError, ChannelClosed) as error:
            raise Refused(Situation.WORKER_LOST, f"a worker died while {model} ran: {error}; try again") from None
        if why:
            raise Refused(Situation.ARCHIVE_FAILED, why)
        try:
            yield trial
        finally:
            self.channel.tell(EndTrial(model, trial.lost))


class Trial:
    """One permitted run. `lost`: the worker that died of it, or fell silent; -1: none."""

    def __init__(self, model: str) -> None:
        self.model, self.lost = model, -1

    def __repr__(self) -> str:
        return f"<Trial of {self.model}>"

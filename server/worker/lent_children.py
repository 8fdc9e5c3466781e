"""Lends children of code archives to the fronts that ask them. On the step thread.

A warm request for an archive of one process and no batches needs nothing of the worker: the front asks the child
itself, and the worker is spared in between (see `server.ipc.lends`). The worker keeps what it owns: the child's
process, its output, memory and end; the slot, on which a lend holds a lease; and the counts, which the front tells.

A child is lent once a few requests in a row came from one front, and comes back when another front asks for its model,
when it is to be unloaded, replaced, scaled or refused, and when memory is short.
"""

import asyncio
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from functools import partial

import structlog

from model_store.cache.slots import Slot, State
from model_store.names import ModelName
from server.code_messages import Measure
from server.ipc.lends import (
    AskReport,
    ChildLost,
    HoldRequests,
    LendChannel,
    LendChild,
    Measured,
    Message,
    Misbehaved,
    Overdue,
    RecallChild,
    Reported,
    Returned,
    Turn,
    Used,
)
from server.worker.quarantine import Quarantine
from server.worker.replies import Origin, Replies
from server.worker.resident_models import ResidentModels
from server.worker.sandbox.child_process import ChildProcess
from server.worker.sandbox.replicas import Replicas
from server.worker.scheduler import Scheduler

MOST_PATIENT = 4096  #: requests in a row from one front, of an archive that several ask: each recall doubles them
MOST_LENT = 512  #: children at a time: each is a descriptor of a front
HOLD_S = 0.5  #: how long a front may keep requests back while the worker answers those before them
SHORT_S = 1.0  #: after memory was short, until children are lent again
REPORT_S = 0.5  #: how long a front may take to tell what it has used

log = structlog.get_logger()


class Stage(Enum):
    """How far a lend is."""

    HOLDING = auto()  #: the front was asked to keep requests back
    HELD = auto()  #: it does, and the worker answers those from before
    LENT = auto()  #: the front asks the child
    LEAVING = auto()  #: the front is to return it, or to take notice of its end


@dataclass(eq=False, slots=True)
class Lend:
    """One child on its way to a front and back."""

    id: int
    slot: Slot
    replicas: Replicas
    child: ChildProcess
    origin: Origin
    channel: LendChannel
    began: float
    stage: Stage = Stage.HOLDING
    is_out: bool = False  #: whether the front has the channel
    waiters: list[asyncio.Future[None]] = field(default_factory=list)

    def __repr__(self) -> str:
        """For example `<Lend 3 of au/NSW1.mar, lent>`."""
        return f"<Lend {self.id} of {self.slot.model}, {self.stage.name.lower()}>"


class LentChildren:
    """See the module. `freed` is told whose child can be given batches again; `wake` schedules a step.

    `note_turn` is told of each request that a front had answered, and of what was measured during it.
    """

    def __init__(
        self,
        residents: ResidentModels,
        scheduler: Scheduler,
        replies: Replies,
        quarantine: Quarantine,
        *,
        freed: Callable[[Replicas], None],
        wake: Callable[[], None],
        now: Callable[[], float],
        note_turn: Callable[[ModelName, Turn, Sequence[Measure]], None],
    ) -> None:
        self._residents, self._scheduler, self._replies, self._quarantine = residents, scheduler, replies, quarantine
        self._freed, self._wake, self._now, self._note_turn = freed, wake, now, note_turn
        self._channels: dict[int, LendChannel] = {}  # by the front's process
        self._fronts: dict[int, int] = {}  # their processes, by the identity of their connections
        self._lends: dict[int, Lend] = {}
        self._of: dict[Slot, Lend] = {}
        self._reports: dict[LendChannel, list[asyncio.Future[None]]] = {}
        self._next_id, self._short_until = 0, 0.0

    def __repr__(self) -> str:
        """For example `<LentChildren 3 lent to 1 fronts>`."""
        return f"<LentChildren {len(self._lends)} lent to {len(self._channels)} fronts>"

    def __len__(self) -> int:
        return len(self._lends)

    # --- fronts -----------------------------------------------------------------------------------------------------

    def accept(self, connection: socket.socket) -> None:
        """A front's channel."""
        channel = LendChannel(
            connection, lambda message, _: self._hear(channel, message), lambda: self._end_channel(channel)
        )
        self._channels[channel.find_peer()] = channel

    def note_front(self, origin: Origin, pid: int) -> None:
        """A front is connected by frames too; its process tells which channel is its own."""
        self._fronts[id(origin)] = pid

    def forget_front(self, origin: Origin) -> None:
        """It is no longer."""
        self._fronts.pop(id(origin), None)

    def _end_channel(self, channel: LendChannel) -> None:
        """The front has gone. What it had under way at a child is unknown, so that the child has to go too."""
        for pid in [pid for pid, each in self._channels.items() if each is channel]:
            del self._channels[pid]
        for lend in [lend for lend in self._lends.values() if lend.channel is channel]:
            if lend.is_out and not lend.child.ended:
                lend.child.end("the front that asked it has gone")
            self._take(lend)
        self._answer_report(channel)

    # --- a lend's way -----------------------------------------------------------------------------------------------

    def note_answer(self, slot: Slot, replicas: Replicas, child: ChildProcess, origin: Origin) -> None:
        """The child has answered a request of this front's, asked by the worker. It may be lent now or soon."""
        lend = self._of.get(slot)
        if lend is not None:
            if lend.origin is origin:
                self._advance(lend)
            else:
                self._contest(lend)
            return
        if replicas.asked_by is not origin:
            replicas.asked_by, replicas.asked = origin, 0
        replicas.asked += 1
        if replicas.asked < replicas.lend_after or not self._may_lend(slot, replicas):
            return
        channel = self._channels.get(self._fronts.get(id(origin), -1))
        if channel is None or len(self._lends) >= MOST_LENT or self._now() < self._short_until:
            return
        leased = self._residents.cache.lease(slot.model, self._now())
        assert leased is slot, "a slot that may be lent is the model's"
        self._next_id += 1
        lend = Lend(self._next_id, slot, replicas, child, origin, channel, self._now())
        self._lends[lend.id] = self._of[slot] = lend
        channel.send(HoldRequests(lend.id, slot.model))

    def note_held(self, origin: Origin, ident: int) -> None:
        """The front keeps requests back from here on: those that it has sent before have come."""
        lend = self._lends.get(ident)
        if lend is not None and lend.origin is origin and lend.stage is Stage.HOLDING:
            lend.stage = Stage.HELD
            self._advance(lend)

    def _advance(self, lend: Lend) -> None:
        """Hand the child over once the worker has answered what it has for it."""
        if not self._may_lend(lend.slot, lend.replicas):
            self._recall(lend)
        elif lend.stage is Stage.HELD and not lend.child.is_busy and not self._scheduler.count(lend.slot.model):
            lend.stage, lend.is_out = Stage.LENT, True
            channel = lend.child.lend(partial(self._note_lost, lend))
            lend.channel.send(LendChild(lend.id, lend.slot.version, lend.child.timeout_s), channel.fileno())

    def _may_lend(self, slot: Slot, replicas: Replicas) -> bool:
        """Whether a front may ask the slot's one child now: the model is as it should be, and stays so."""
        cache, model = self._residents.cache, slot.model
        return (
            replicas.wanted == len(replicas.children) == 1
            and not replicas.starts
            and not replicas.ended
            and replicas.loaded.batch_size == 1
            and cache.get(model) is slot
            and slot.state is State.READY
            and not slot.condemned
            and model not in cache.loads
            and model not in self._quarantine.reasons
        )

    def _contest(self, lend: Lend) -> None:
        """Another front asks for the model: it is the worker's again, and for longer than the last time."""
        lend.replicas.lend_after = min(MOST_PATIENT, 2 * lend.replicas.lend_after)
        self._recall(lend)

    def _recall(self, lend: Lend) -> None:
        if lend.stage is not Stage.LEAVING:
            lend.stage = Stage.LEAVING
            lend.channel.send(RecallChild(lend.id))

    def _note_lost(self, lend: Lend, why: str) -> None:
        """The child has ended while the front had it."""
        lend.stage = Stage.LEAVING
        lend.channel.send(ChildLost(lend.id, why))

    def _take(self, lend: Lend) -> None:
        """The front has nothing of the child any more."""
        del self._lends[lend.id], self._of[lend.slot]
        lend.replicas.asked = 0
        if lend.is_out:
            lend.child.take_back()
        if self._residents.cache.release(lend.slot):
            self._residents.retire(lend.slot)
        self._freed(lend.replicas)
        self._wake()
        for waiter in lend.waiters:
            if not waiter.done():
                waiter.set_result(None)

    # --- who wants children back ------------------------------------------------------------------------------------

    def recall(self, slot: Slot) -> None:
        """Requests for the slot's child wait in the worker: another front's, or such as a front cannot ask."""
        lend = self._of.get(slot)
        if lend is not None:
            self._contest(lend)

    async def take_back(self, model: ModelName) -> None:
        """Return when no front has the model's children any more."""
        waiters = list[asyncio.Future[None]]()
        for lend in [lend for lend in self._lends.values() if lend.slot.model == model]:
            self._recall(lend)
            lend.waiters.append(asyncio.get_running_loop().create_future())
            waiters.append(lend.waiters[-1])
        if waiters:
            await asyncio.wait(waiters)

    def make_room(self) -> None:
        """Memory is short: what is lent cannot be evicted, so nothing is for a while."""
        if self._lends:
            self._short_until = self._now() + SHORT_S
            for lend in list(self._lends.values()):
                self._recall(lend)

    def advance_time(self, now: float) -> None:
        """Recall what may be lent no longer, and what a front has kept back for too long."""
        for lend in list(self._lends.values()):
            waits = lend.stage in {Stage.HOLDING, Stage.HELD} and now - lend.began > HOLD_S
            if waits or not self._may_lend(lend.slot, lend.replicas):
                self._recall(lend)

    async def gather_reports(self) -> None:
        """Wait until the fronts have told what was used until now, so that counts are whole."""
        waiting = list[asyncio.Future[None]]()
        for channel in {lend.channel for lend in self._lends.values()}:
            waiting.append(asyncio.get_running_loop().create_future())
            self._reports.setdefault(channel, []).append(waiting[-1])
            channel.send(AskReport())
        if waiting:
            await asyncio.wait(waiting, timeout=REPORT_S)

    # --- what fronts say --------------------------------------------------------------------------------------------

    def _hear(self, channel: LendChannel, message: Message) -> None:
        if isinstance(message, Reported):
            self._answer_report(channel)
            return
        if not isinstance(message, Used | Measured | Returned | Overdue | Misbehaved):
            channel.close()  # no front of ours
            return
        lend = self._lends.get(message.id)
        if lend is None or lend.channel is not channel:
            return
        if isinstance(message, Used):
            for turn in message.turns:
                self._replies.count_lent(lend.slot, turn)
                self._note_turn(lend.slot.model, turn, ())
        elif isinstance(message, Measured):
            self._note_turn(lend.slot.model, message.turn, message.measures)
        elif isinstance(message, Returned):
            self._take(lend)
        elif isinstance(message, Overdue):
            lend.child.tell_late()
        else:
            lend.child.end(message.why)

    def _answer_report(self, channel: LendChannel) -> None:
        for waiter in self._reports.pop(channel, []):
            if not waiter.done():
                waiter.set_result(None)

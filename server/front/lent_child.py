"""One child of a code archive that a worker has lent to this front: requests to it, and answers of its.

Runs on the front's event loop. A child is foreign code: what it says is checked as the worker checks it, is held in
bounded memory, and at the first word out of turn the worker ends it.
"""

import asyncio
import contextlib
import socket
import time
from collections import deque
from collections.abc import Sequence
from enum import Enum, auto
from typing import Protocol

import msgspec

from server.access_log import LOST, REFUSED
from server.code_messages import (
    ENDED,
    MAX_ANSWER_BYTES,
    MAX_PARTS,
    RECEIVE_BYTES,
    BatchAnswered,
    ChildMessages,
    CodeAnswer,
    Measure,
    PartAnswered,
    ProtocolError,
    RunBatch,
    frame,
)
from server.errors import Refused, Situation
from server.front.backlog import Turns
from server.ipc.code_answers import make_request, read_answer, read_part, refuse_ended
from server.ipc.frames import CacheResult, Partial, Request, Response, Tier, TracedRequest
from server.ipc.lends import (
    MOST_MEASURES,
    MOST_TURNS,
    Measured,
    Message,
    Misbehaved,
    Overdue,
    Returned,
    Turn,
    Used,
)

AHEAD = 4  #: requests that a child has at most, so that it finds the next one when it has answered
QUICK_S = 0.005  #: what a request takes at most that others are sent behind: these cannot be taken back
IDLE_S = 1.0  #: without a request, and a child is returned
_NOTHING = memoryview(b"")


class AnswerRoom(Protocol):
    """The bytes that a front holds. Whatever receives a body adds to `size`."""

    size: int

    @property
    def has_room(self) -> bool:
        """Whether more may be held."""


class ChildOwner(Protocol):
    """All that one worker has lent. `room`: for answers that are half there."""

    room: AnswerRoom

    def hand_back(self, request: Request) -> None:
        """The child has not begun it: it is the worker's."""

    def answer(self, response: Response) -> None:
        """The answer to a request."""

    def pass_part(self, part: Partial) -> None:
        """A part of an answer that is being made. Raises Refused where the front holds too much for slow clients."""

    def drop_parts(self, ident: int) -> None:
        """Nobody waits for the answer any more."""

    def tell(self, message: Message) -> None:
        """Tell the worker."""

    def forget(self, child: "LentChild") -> None:
        """It takes no more requests."""

    def end(self, child: "LentChild") -> None:
        """It has been returned."""


class Stage(Enum):
    """Whose the child is."""

    HELD = auto()  #: the worker's; requests are kept back here
    LENT = auto()  #: this front's
    LEAVING = auto()  #: the worker's, as soon as what is under way has ended
    LOST = auto()  #: nobody's: it has ended or said what it should not, and the worker says what that means


class _Running(msgspec.Struct, frozen=True, gc=False):
    request: Request
    sent: float  #: seconds on the monotonic clock


class LentChild:
    """One child, and the requests that are left to it. INVARIANT: its answers come in the order of its requests."""

    def __init__(self, ident: int, model: str, owner: ChildOwner) -> None:
        self.id, self.model, self.stage = ident, model, Stage.HELD
        self._owner = owner
        self._socket: socket.socket | None = None
        self._loop = asyncio.get_running_loop()
        self._version, self._timeout_s = "", 0.0
        self._queue: Turns[Request] = Turns()
        self._running: deque[_Running] = deque()
        self._dropped: dict[int, int] = {}  # running ones that nobody waits for any more, and their outcome
        self._messages, self._counted = ChildMessages(), 0
        self._unsent = _NOTHING
        self._free_at = self._used_at = time.monotonic()  # since when the child has had the first of those running
        self._most = 1  # requests that it may have at a time
        self._is_reading = self._is_overdue = False
        self._parts = self._part_bytes = 0  # of the answer that is being made
        self._turns: list[Turn] = []

    def __repr__(self) -> str:
        """For example `<LentChild 3 of au/NSW1.mar, lent, 2 running, 5 wait>`."""
        stage = self.stage.name.lower()
        return f"<LentChild {self.id} of {self.model}, {stage}, {len(self._running)} running, {len(self._queue)} wait>"

    # --- requests ---------------------------------------------------------------------------------------------------

    @property
    def is_here(self) -> bool:
        """Whether the child is this front's, whatever the worker does."""
        return self.stage in {Stage.LENT, Stage.LEAVING}

    def put(self, request: Request) -> None:
        """A request, to be answered by the child or handed back."""
        if self.stage is Stage.LENT and not self._unsent and not self._queue and len(self._running) < self._most:
            self._send_one(request)
        else:
            self._queue.put(self.model, request.id, request, request.client)

    def drop(self, ident: int, outcome: int = LOST) -> None:
        """Nobody waits for the answer any more. What runs goes on."""
        if self._queue.drop(ident):
            now = time.monotonic()
            self._turns.append(Turn(now, now, now, outcome))
        elif any(each.request.id == ident for each in self._running):
            self._dropped[ident] = outcome
        self._owner.drop_parts(ident)

    def begin(self, channel: socket.socket, version: str, timeout_s: float) -> None:
        """The child is this front's."""
        self.stage, self._socket, self._version, self._timeout_s = Stage.LENT, channel, version, timeout_s
        self._free_at = self._used_at = time.monotonic()
        self._keep_reading()
        self._send_next()

    def _send_next(self) -> None:
        """Send what the child may have now, in one write."""
        if self.stage is Stage.LENT and self._queue and not self._unsent:
            room = min(self._most - len(self._running), len(self._queue))
            if room == 1:
                self._send_one(self._queue.take())
            elif room > 1:
                self._send([self._queue.take() for _ in range(room)])

    def _send_one(self, request: Request) -> None:
        self._running.append(_Running(request, time.monotonic()))
        self._write(frame(RunBatch([make_request(request)])))

    def _send(self, requests: Sequence[Request]) -> None:
        now = time.monotonic()
        self._running.extend(_Running(request, now) for request in requests)
        self._write(b"".join([frame(RunBatch([make_request(request)])) for request in requests]))

    def _write(self, data: bytes | memoryview) -> None:
        assert self._socket is not None, "only a child that is here is asked"
        try:
            sent = self._socket.send(data)
        except BlockingIOError:
            sent = 0
        except OSError:
            self._unsent = memoryview(data)
            return  # it has ended: the worker says why
        if sent < len(data):
            self._unsent = memoryview(data)[sent:]
            self._loop.add_writer(self._socket.fileno(), self._write_rest)

    def _write_rest(self) -> None:
        assert self._socket is not None, "only a child that is here is asked"
        self._loop.remove_writer(self._socket.fileno())
        data, self._unsent = self._unsent, _NOTHING
        self._write(data)
        self._send_next()

    # --- answers ----------------------------------------------------------------------------------------------------

    def _read(self) -> None:
        try:
            self._receive()
        except ProtocolError as error:
            self._give_up(str(error))
            return
        if self.stage is Stage.LENT:
            self._send_next()
        elif not self._running:
            self._leave()

    def _receive(self) -> bool:
        """Take what has come. False if nothing had. Raises ProtocolError for what no child of ours would say."""
        assert self._socket is not None, "only a child that is here is read"
        try:
            data = self._socket.recv(RECEIVE_BYTES)
        except BlockingIOError:
            return False
        except OSError as error:
            raise ProtocolError(str(error)) from error
        if not data:
            raise ProtocolError(ENDED)
        for message in self._messages.feed(data):
            if isinstance(message, PartAnswered) and self._running and not message.index:
                self._pass_part(message.answer)
                continue
            if not isinstance(message, BatchAnswered) or not self._running or len(message.answers) != 1:
                raise ProtocolError("it answered what it was not asked")
            self._finish(message.answers[0], measures=message.measures)
        if self._counted or self._messages:
            self._count_held()
        return True

    def _count_held(self) -> None:
        """Count an answer that is half there. While the front holds too much, the child waits."""
        room, held = self._owner.room, len(self._messages)
        room.size += held - self._counted
        self._counted = held
        if held and not room.has_room:
            self._stop_reading()

    def _pass_part(self, answer: CodeAnswer) -> None:
        """Pass on a part of the first one's answer. Raises ProtocolError for more than an answer may have."""
        self._parts += 1
        self._part_bytes += len(answer.body)
        if self._parts > MAX_PARTS or self._part_bytes > MAX_ANSWER_BYTES:
            raise ProtocolError(f"the answers of a batch have {MAX_PARTS} parts and {MAX_ANSWER_BYTES} bytes at most")
        ident = self._running[0].request.id
        if ident in self._dropped:
            return
        try:
            content_type, body, head = read_part(answer)
            self._owner.pass_part(Partial(ident, content_type, body, head))
        except Refused as refused:
            self._dropped[ident] = REFUSED
            self._owner.answer(self._make_response(ident, "", b"", b"", (0, 0), refused))

    def _make_response(
        self, ident: int, content_type: str, body: bytes, head: bytes, times: tuple[int, int], refused: Refused | None
    ) -> Response:
        """As the worker would send it. `times`: in the queue and in the child, in microseconds."""
        if refused is not None:
            content_type, body, head = "application/json", msgspec.json.encode(refused.detail), b""
        situation, hit = Situation.OK if refused is None else refused.situation, CacheResult.HIT
        queue_us, run_us = times
        version, size = self._version, len(body)
        return Response(ident, situation, hit, Tier.NONE, version, content_type, queue_us, 0, run_us, size, body, head)

    def _finish(
        self, answer: CodeAnswer | None, refused: Refused | None = None, measures: Sequence[Measure] = ()
    ) -> None:
        """The first of those running has its answer, or the reason why there is none."""
        running = self._running.popleft()
        request, sent = running.request, running.sent
        now, began = time.monotonic(), max(sent, self._free_at)
        self._free_at = self._used_at = now
        self._most, self._is_overdue = AHEAD if now - began < QUICK_S else 1, False
        self._parts = self._part_bytes = 0
        content_type, body, head = "", b"", b""
        if answer is not None:
            try:
                content_type, body, head = read_answer(answer, is_told=bool(request.call))
            except Refused as error:
                refused = error
        arrived = min(began, request.arrived_ns / 1e9) or began
        outcome = REFUSED if refused is not None else int(CacheResult.HIT)
        if request.id in self._dropped:
            outcome = self._dropped.pop(request.id)
        else:
            times = int((began - arrived) * 1e6), int((now - began) * 1e6)
            self._owner.answer(self._make_response(request.id, content_type, body, head, times, refused))
        turn = Turn(arrived, began, now, outcome, request.trace_id if isinstance(request, TracedRequest) else "")
        if measures:
            for at in range(0, len(measures), MOST_MEASURES):
                self._owner.tell(Measured(self.id, turn, list(measures[at : at + MOST_MEASURES])))
        self._turns.append(turn)
        if len(self._turns) >= MOST_TURNS:
            self.report()

    # --- the end ----------------------------------------------------------------------------------------------------

    def recall(self) -> None:
        """The worker wants it: hand back what has not begun, and the child when nothing is under way."""
        if self.stage in {Stage.HELD, Stage.LENT}:
            self.stage = Stage.LEAVING
            self._owner.forget(self)
            self._hand_back_queue()
            if not self._running:
                self._leave()

    def _give_up(self, why: str) -> None:
        """It is of no use any more. The worker ends it, and says what became of it."""
        if self.stage is not Stage.LOST:
            self.stage = Stage.LOST
            self._stop_reading()
            self._owner.forget(self)
            self._hand_back_queue()
            self._owner.tell(Misbehaved(self.id, why))

    def note_lost(self, why: str) -> None:
        """It has ended. What it has said before counts; who was first waits in vain, and the others have not begun."""
        self._owner.forget(self)
        if self.stage in {Stage.LENT, Stage.LEAVING}:
            with contextlib.suppress(ProtocolError):
                while self._receive():
                    pass
        self.stage = Stage.LOST
        if self._running:
            self._finish(None, refuse_ended(self.model, why))
        self._hand_back_running()
        self._hand_back_queue()
        self._leave()

    def abandon(self) -> None:
        """The worker is gone, or knows nothing of this front any more: all that has no answer is asked anew."""
        self.stage = Stage.LOST
        if self._running and self._parts:  # half of its answer is with the client
            self._finish(None, Refused(Situation.WORKER_LOST, "the worker has forgotten the process that answered"))
        self._hand_back_running()
        self._hand_back_queue()
        self.close()

    def _hand_back_running(self) -> None:
        while self._running:
            request = self._running.popleft().request
            if self._dropped.pop(request.id, None) is None:
                self._owner.hand_back(request)

    def _hand_back_queue(self) -> None:
        while self._queue:
            self._owner.hand_back(self._queue.take())

    def _leave(self) -> None:
        """The worker's again."""
        self.close()
        self._owner.end(self)
        self.report()
        self._owner.tell(Returned(self.id))

    def close(self) -> None:
        """Close the channel."""
        if self._socket is not None:
            self._stop_reading()
            self._loop.remove_writer(self._socket.fileno())
            self._socket.close()
            self._socket = None
        self._owner.room.size -= self._counted
        self._counted = 0

    # --- time -------------------------------------------------------------------------------------------------------

    def sweep(self, now: float) -> None:
        """Tell what was done, read again where there is room, return what nobody asks, report what takes too long."""
        self.report()
        if self.stage is Stage.LENT or (self.stage is Stage.LEAVING and self._running):
            if not self._is_reading:
                self._used_at = self._free_at = now  # it waits for this front
                if self._owner.room.has_room:
                    self._keep_reading()
            elif self._running and not self._is_overdue:
                self._is_overdue = now - max(self._free_at, self._running[0].sent) > self._timeout_s
                if self._is_overdue:
                    self._owner.tell(Overdue(self.id))
        if self.stage is Stage.LENT and not self._running and not self._queue and now - self._used_at > IDLE_S:
            self.recall()

    def report(self) -> None:
        """Tell the worker what the child has done."""
        if self._turns:
            turns, self._turns = self._turns, []
            self._owner.tell(Used(self.id, turns))

    def _keep_reading(self) -> None:
        if self._socket is not None and not self._is_reading:
            self._is_reading = True
            self._loop.add_reader(self._socket.fileno(), self._read)

    def _stop_reading(self) -> None:
        if self._socket is not None and self._is_reading:
            self._is_reading = False
            self._loop.remove_reader(self._socket.fileno())

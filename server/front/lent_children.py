"""The children of code archives that a worker has lent to this front.

Runs on the front's event loop. The worker is told what they have done; see `server.ipc.lends` for how a lend begins and
ends.
"""

import socket
from collections.abc import Iterator
from typing import Protocol

from server.contract import OPEN_INFERENCE_DESCRIBE
from server.errors import Refused, Situation
from server.front.lent_child import AnswerRoom, LentChild, Stage
from server.ipc.frames import Held, Partial, Request, Response
from server.ipc.lends import (
    AskReport,
    ChildLost,
    HoldRequests,
    LendChannel,
    LendChild,
    Message,
    RecallChild,
    Reported,
)
from server.ipc.part_streams import PartStreams


class RequestOwner(Protocol):
    """The link to the worker, whose requests these are."""

    def send(self, frame: Held) -> None:
        """Send a frame to the worker, behind all that were sent before."""

    def hand_back(self, request: Request) -> None:
        """The child has not begun it."""

    def answer(self, response: Response | Partial) -> None:
        """Its answer, or a part of one."""


class LentChildren:
    """What one worker has lent. `room`: for answers that are half there."""

    def __init__(self, link: RequestOwner, connection: socket.socket, room: AnswerRoom) -> None:
        self._link, self.room = link, room
        self._children: dict[int, LentChild] = {}
        self._streams, self._counted = PartStreams(), 0
        self._of: dict[str, LentChild] = {}  # those that take requests, by model
        self._channel = LendChannel(connection, self._hear, self._end)

    def __repr__(self) -> str:
        """For example `<LentChildren 3>`."""
        return f"<LentChildren {len(self._children)}>"

    def __len__(self) -> int:
        return len(self._children)

    def find(self, request: Request) -> LentChild | None:
        """The child that the request is left to; None: the worker's."""
        child = self._of.get(request.model)
        if child is None or request.alone or request.content_type == OPEN_INFERENCE_DESCRIBE:
            return None
        return child

    def has(self, model: str) -> bool:
        """Whether a child that answers this model is here."""
        return model in self._of

    def hand_back(self, request: Request) -> None:
        """The child has not begun it."""
        self._link.hand_back(request)

    def answer(self, response: Response) -> None:
        """The answer, behind its parts that wait."""
        if self._streams.has(response.id):
            self._pass_on(self._streams.end(response))
        else:
            self._link.answer(response)

    def pass_part(self, part: Partial) -> None:
        """A part of an answer. Raises Refused where the front holds too much for slow clients."""
        if not self.room.has_room:
            message = "bytes of answers wait for slow clients already, as many as max_inflight_bytes allows"
            raise Refused(Situation.OVERLOADED, message)
        self._pass_on(self._streams.add(part))

    def add_credit(self, ident: int, size: int) -> None:
        """The client of such an answer has taken so many bytes."""
        self._pass_on(self._streams.add_credit(ident, size))

    def drop_parts(self, ident: int) -> None:
        """Nobody waits for the answer any more."""
        self._streams.drop(ident)
        self._count_parts()

    def _pass_on(self, frames: Iterator[Partial | Response]) -> None:
        for each in frames:
            self._link.answer(each)
        self._count_parts()

    def _count_parts(self) -> None:
        self.room.size += self._streams.held_bytes - self._counted
        self._counted = self._streams.held_bytes

    def sweep(self, now: float) -> None:
        """What depends on time, regularly."""
        for child in list(self._children.values()):
            child.sweep(now)

    def tell(self, message: Message) -> None:
        """Tell the worker."""
        self._channel.send(message)

    def forget(self, child: LentChild) -> None:
        """It takes no more requests."""
        if self._of.get(child.model) is child:
            del self._of[child.model]

    def end(self, child: LentChild) -> None:
        """It has been returned."""
        self.forget(child)
        self._children.pop(child.id, None)

    def return_all(self) -> None:
        """This front takes no more requests."""
        for child in list(self._children.values()):
            child.recall()

    def close(self) -> None:
        """The worker is gone, and its children with it: their requests end with the link."""
        self._channel.close()

    def _end(self) -> None:
        """The channel has ended, and so has all that was lent: the worker ends children whose state it cannot know."""
        children = list(self._children.values())
        self._children.clear()
        self._of.clear()
        for child in children:
            child.abandon()

    def _hear(self, message: Message, descriptor: int) -> None:
        child = self._children.get(getattr(message, "id", 0))
        if isinstance(message, LendChild) and descriptor >= 0:
            channel = socket.socket(fileno=descriptor)
            if child is None or child.stage is not Stage.HELD:
                channel.close()
            else:
                child.begin(channel, message.version, message.timeout_s)
        elif isinstance(message, HoldRequests):
            held = LentChild(message.id, message.model, self)
            self._children[held.id] = self._of[held.model] = held
            self._link.send(Held(held.id))
        elif isinstance(message, RecallChild):
            if child is not None:
                child.recall()
        elif isinstance(message, ChildLost):
            if child is not None:
                child.note_lost(message.why)
        elif isinstance(message, AskReport):
            for each in self._children.values():
                each.report()
            self.tell(Reported())

"""How a worker lends the child of a code archive to a front, which then asks it without the worker in between.

Each front has a channel to each worker for it, a Unix socket of packets beside the connection of frames: a packet may
carry a descriptor. A lend begins and ends so:

1. `HoldRequests`: the front keeps further requests for the model back and says `Held` behind those that it has sent
   before, on the connection of frames. The worker answers these.
2. `LendChild` carries a copy of the child's channel: the front asks the child, and tells now and then what it `Used`.
3. `RecallChild`, or a while without requests, ends it: the front asks no more, waits for what is under way, hands what
   has not begun to the worker, and says `Returned`. `ChildLost` ends it too, with the reason.

INVARIANT: a child has one owner, the worker or one front; nothing is under way on its channel when it changes.
"""

import asyncio
import contextlib
import os
import socket
import struct
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import msgspec
import structlog
from msgspec import Struct

from server.code_messages import Measure

SUFFIX = ".lends"  #: of the socket's path, behind that of the worker's socket
MAX_PACKET = 64 * 1024
MOST_TURNS, MOST_MEASURES = 512, 16  #: that one packet tells
RECEIVED_AT_ONCE = 32  #: packets, before others have their turn on the event loop
_CREDENTIALS = struct.Struct("3i")

log = structlog.get_logger()


class Turn(NamedTuple):
    """One request that a front had a child answer: seconds on the monotonic clock, and what became of it."""

    arrived: float
    began: float
    ended: float
    outcome: int  #: as the access log says it, see `server.access_log`
    trace_id: str = ""  #: where the request was sampled


class HoldRequests(Struct, frozen=True, tag=True):
    """To a front: keep requests for the model back."""

    id: int
    model: str


class LendChild(Struct, frozen=True, tag=True):
    """To a front, with the child's channel. `timeout_s`: what a request may take."""

    id: int
    version: str
    timeout_s: float


class RecallChild(Struct, frozen=True, tag=True):
    """To a front: the worker wants it back."""

    id: int


class ChildLost(Struct, frozen=True, tag=True):
    """To a front: the child has ended, and why."""

    id: int
    why: str


class AskReport(Struct, frozen=True, tag=True):
    """To a front: tell now what was used, and `Reported` behind it."""


class Used(Struct, frozen=True, tag=True):
    """From a front: what the child has done since the last time."""

    id: int
    turns: list[Turn]


class Measured(Struct, frozen=True, tag=True):
    """From a front: what the child's handler has measured during a request."""

    id: int
    turn: Turn
    measures: list[Measure]


class Returned(Struct, frozen=True, tag=True):
    """From a front: it is the worker's again."""

    id: int


class Overdue(Struct, frozen=True, tag=True):
    """From a front: the child takes longer than it may."""

    id: int


class Misbehaved(Struct, frozen=True, tag=True):
    """From a front: the child has said what no child of ours would, or has closed its channel."""

    id: int
    why: str


class Reported(Struct, frozen=True, tag=True):
    """From a front: the answer to `AskReport`."""


ToFront = HoldRequests | LendChild | RecallChild | ChildLost | AskReport
FromFront = Used | Measured | Returned | Overdue | Misbehaved | Reported
Message = ToFront | FromFront

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Message).decode


class LendChannel:
    """One end of such a channel. `heard` gets each message with its descriptor (-1: none), `ended` is called once.

    INVARIANT: who gets a descriptor closes it.
    """

    def __init__(self, ours: socket.socket, heard: Callable[[Message, int], None], ended: Callable[[], None]) -> None:
        self._socket, self._heard, self._on_end = ours, heard, ended
        self._unsent: deque[tuple[bytes, Sequence[int]]] = deque()
        self._loop = asyncio.get_running_loop()
        self.is_open = True
        ours.setblocking(False)
        self._loop.add_reader(ours.fileno(), self._receive)

    def __repr__(self) -> str:
        """For example `<LendChannel, 2 packets unsent>`."""
        return f"<LendChannel, {len(self._unsent)} packets unsent>"

    def find_peer(self) -> int:
        """The process at the other end."""
        return find_peer(self._socket)

    def send(self, message: Message, descriptor: int = -1) -> None:
        """Send it, now or when the other end has read what is there. The descriptor stays the caller's."""
        if not self.is_open:
            return
        copies = () if descriptor < 0 else (os.dup(descriptor),)
        self._unsent.append((_encode(message), copies))
        if len(self._unsent) == 1:
            self._flush()

    def close(self) -> None:
        """End it; `ended` is called."""
        if not self.is_open:
            return
        self.is_open = False
        self._loop.remove_reader(self._socket.fileno())
        self._loop.remove_writer(self._socket.fileno())
        self._socket.close()
        for _, copies in self._unsent:
            _close_all(copies)
        self._unsent.clear()
        self._on_end()

    def _flush(self) -> None:
        while self._unsent:
            packet, copies = self._unsent[0]
            try:
                socket.send_fds(self._socket, [packet], copies)
            except BlockingIOError:
                self._loop.add_writer(self._socket.fileno(), self._flush)
                return
            except OSError:
                self.close()
                return
            _close_all(copies)
            self._unsent.popleft()
        self._loop.remove_writer(self._socket.fileno())

    def _receive(self) -> None:
        for _ in range(RECEIVED_AT_ONCE):
            if not self.is_open:
                return
            try:
                packet, descriptors, _, _ = socket.recv_fds(self._socket, MAX_PACKET, 1, socket.MSG_CMSG_CLOEXEC)
            except BlockingIOError:
                return
            except OSError:
                packet, descriptors = b"", []
            if not packet:
                self.close()
                return
            try:
                message = _decode(packet)
            except msgspec.MsgspecError as error:
                log.error("bad_packet", channel=repr(self), error=str(error))  # noqa: TRY400 -- the peer's fault
                _close_all(list(descriptors))
                self.close()
                return
            self._heard(message, descriptors[0] if descriptors else -1)


def find_peer(connection: socket.socket) -> int:
    """The process at the other end of a Unix socket, as the kernel knows it."""
    found = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return int(_CREDENTIALS.unpack(found)[0])


def listen_for_lends(path: str, accept: Callable[[socket.socket], None]) -> socket.socket:
    """Take the channels of fronts, until the socket is closed. Raises OSError."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.setblocking(False)
    listener.bind(path + SUFFIX)
    listener.listen()

    def take() -> None:
        with contextlib.suppress(OSError):  # it has gone already
            accept(listener.accept()[0])

    asyncio.get_running_loop().add_reader(listener.fileno(), take)
    return listener


def connect_for_lends(path: str) -> socket.socket | None:
    """A channel to the worker that listens at the path; None where it lends nothing."""
    channel = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        channel.connect(path + SUFFIX)
    except OSError:
        channel.close()
        return None
    return channel


def _close_all(descriptors: Sequence[int]) -> None:
    for each in descriptors:
        os.close(each)

"""A front's connection to a front of another node: the frames of `server.ipc.frames`, over TCP.

Clocks of hosts differ, so times travel as spans: `deadline_ns` is what is left, `arrived_ns` how long ago it was.
"""

import asyncio
import contextlib
import socket
import ssl
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from server.front.nodes.handshake import ConnectingHandshake
from server.front.tracing.request_trace import Question
from server.front.worker_client import WorkerCall, WorkerLink
from server.ipc.frames import Cancel, Credit, Held, Partial, Request, Response, Stages

CONNECT_S = 5.0
#: A host that is gone without a word ends the connection by then; the kernel asks it every second.
DEAD_MS = 4000

BEAT = "application/vnd.fleetcast.beat"  #: content type of a request that no model is asked by
LOAD = "application/vnd.fleetcast.load"  #: of one that loads its model, answered with the version
UNLOAD = "application/vnd.fleetcast.unload"
DESCRIBE = "application/vnd.fleetcast.describe-node"  #: of one that asks what the node does, for a viewer elsewhere


class NodeLink(WorkerLink):
    """See the module. A node takes the place that a worker has for a `WorkerLink`."""

    def __init__(self, node: int, on_lost: Callable[[WorkerLink], None]) -> None:
        super().__init__(node, on_lost)
        self._beats: set[int] = set()

    def __repr__(self) -> str:
        """For example `<NodeLink to node 1234: 12 calls>`."""
        return f"<NodeLink to node {self.worker}: {len(self._calls)} calls>"

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Both nodes have proven themselves."""
        super().connection_made(transport)
        set_socket_options(transport)

    def give_up(self) -> None:
        """The node is silent: what it has not begun to answer goes elsewhere. A beat stays: its answer ends that."""
        beats = {ident: call for ident, call in self._calls.items() if ident in self._beats}
        for ident in beats:
            del self._calls[ident]
        super().give_up()
        self._calls.update(beats)

    def _trace(self, call: WorkerCall, request: Request, question: Question) -> Request:
        """As any other: what the other node's stages say is on its own clock."""
        del call, question
        return request

    def beat(self, deadline: float) -> WorkerCall:
        """Ask whether the node's front turns."""
        call = self.call("", BEAT, "", deadline, b"")
        self._beats = {call.id}
        return call

    def describe(self, deadline: float) -> WorkerCall:
        """Ask what the node does."""
        return self.call("", DESCRIBE, "", deadline, b"")

    def send(self, frame: Request | Response | Cancel | Credit | Held | Partial | Stages) -> None:
        """Send a frame; a request's times become spans."""
        super().send(spread_times(frame, time.monotonic_ns()) if isinstance(frame, Request) else frame)


def spread_times(request: Request, now_ns: int) -> Request:
    """The request with spans in the place of this host's times."""
    left, age = max(0, request.deadline_ns - now_ns), max(1, now_ns - request.arrived_ns)
    return msgspec.structs.replace(request, deadline_ns=left, arrived_ns=age)


def set_socket_options(transport: asyncio.BaseTransport) -> None:
    """Have the kernel end a connection to a host that is gone, and send frames at once."""
    sock = transport.get_extra_info("socket")
    options = [
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
        *((socket.IPPROTO_TCP, getattr(socket, name), value) for name, value in _KEEP_ALIVE if hasattr(socket, name)),
    ]
    for level, name, value in options:
        with contextlib.suppress(OSError):
            sock.setsockopt(level, name, value)


_KEEP_ALIVE = (("TCP_KEEPIDLE", 1), ("TCP_KEEPINTVL", 1), ("TCP_KEEPCNT", 3), ("TCP_USER_TIMEOUT", DEAD_MS))


def make_client_context(certificate: Path | None) -> ssl.SSLContext | None:
    """TLS for links, where the cluster speaks it. The secret vouches for the certificate: see `handshake`."""
    if certificate is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


async def connect_to_node(
    address: str, number: int, secret: bytes, tls: ssl.SSLContext | None, on_lost: Callable[[WorkerLink], None]
) -> NodeLink:
    """A link to the node at HOST:PORT. Raises OSError, NotProven, TimeoutError."""
    host, _, port = address.rpartition(":")
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(CONNECT_S):
        _, handshake = await loop.create_connection(
            lambda: ConnectingHandshake(secret, lambda: NodeLink(number, on_lost)), host.strip("[]"), int(port), ssl=tls
        )
        link: NodeLink = await handshake.done
    return link

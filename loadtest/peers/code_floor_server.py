"""The floor of a code archive's warm request: the smallest chain of Python that runs its handler in another process.

A front (uvloop) finds the model in the head of a request and passes the body on to the model's process, which was
forked from one that has imported torch. That one decodes the JSON, calls the handler and answers with JSON, and the
front puts a head before it. There are no checks, limits, measurements, time-outs and loads, and clients are such as
wrk: they wait for each answer. What the floor misses, no server of this shape reaches on that machine.

`python -P -m loadtest.peers.code_floor_server PORT WEIGHTS COUNT` serves m0, m1, ... of the folder WEIGHTS until it is
killed.
"""

import asyncio
import gc
import importlib
import os
import signal
import socket
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import msgspec
import uvloop

from loadtest.peers.environments import HERE
from server.contract import HEADER_TARGET_MODEL

PACKET_BYTES = 64 * 1024  #: of a request's or an answer's JSON
_MODEL, _LENGTH, _BLANK = HEADER_TARGET_MODEL.lower().encode(), b"content-length", b"\r\n\r\n"


class ModelProcess:
    """The front's side of a model's process. INVARIANT: answers come in the order of requests."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._asked: deque[asyncio.Transport] = deque()

    def __repr__(self) -> str:
        return f"<ModelProcess {len(self._asked)} asked>"

    def ask(self, body: bytes, client: asyncio.Transport) -> None:
        """Pass a request on. It blocks only where a process has as many requests as its socket holds."""
        self._asked.append(client)
        self._channel.send(body)

    def read(self) -> None:
        """Give an answer to who has asked first."""
        body = self._channel.recv(PACKET_BYTES)
        head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body)
        self._asked.popleft().write(head + body)


class Client(asyncio.Protocol):
    """One connection of a client that waits for each answer."""

    def __init__(self, models: Mapping[bytes, ModelProcess]) -> None:
        self._models, self._received = models, b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client has connected."""
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        """Pass on a whole request."""
        self._received = received = self._received + data
        head, blank, body = received.partition(_BLANK)
        head = head.lower()
        if blank and len(body) == int(_read_field(head, _LENGTH)):
            self._received = b""
            self._models[_read_field(head, _MODEL)].ask(body, self._transport)


def _read_field(head: bytes, name: bytes) -> bytes:
    """The value of a field that is there."""
    return head.partition(b"\r\n" + name + b":")[2].partition(b"\r\n")[0].strip()


async def serve_clients(port: int, channels: Sequence[socket.socket]) -> None:
    """The front, until it is killed."""
    loop = asyncio.get_running_loop()
    models = {b"m%d" % i: ModelProcess(channel) for i, channel in enumerate(channels)}
    for model, channel in zip(models.values(), channels, strict=True):
        loop.add_reader(channel.fileno(), model.read)
    server = await loop.create_server(lambda: Client(models), "127.0.0.1", port)
    await server.serve_forever()


def answer_requests(channel: socket.socket, model_dir: Path) -> None:
    """A model's process, until it is killed."""
    handle = importlib.import_module("handler").handle
    context = SimpleNamespace(system_properties={"model_dir": str(model_dir)})
    handle(None, context)
    decode, encode = msgspec.json.Decoder().decode, msgspec.json.Encoder().encode
    while body := channel.recv(PACKET_BYTES):
        channel.send(encode(handle([{"body": decode(body)}], context)[0]))


def main(port: int, weights: Path, count: int) -> None:
    """Fork the front, which imports no torch, and then a process for each model."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(count)]
    if os.fork() == 0:
        uvloop.run(serve_clients(port, [front for front, _ in pairs]))
    sys.path[:0] = [str(HERE), str(HERE / "mms")]
    for name in ("torch", "safetensors.torch"):
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    for i, (_, channel) in enumerate(pairs):
        if os.fork() == 0:
            answer_requests(channel, weights / f"m{i}")
            os._exit(0)
    signal.pause()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))

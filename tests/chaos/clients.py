"""Clients that keep asking over kept-alive connections and record what becomes of every request.

They run in an event loop on a thread of their own, so that faults, which block, do not hold them up. How late that loop
itself runs is measured, because it is no fault of the server.
"""

import asyncio
import random
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

from tests.chaos.checker import Record
from tests.chaos.world import BROKEN, Answers
from tests.patience import PATIENCE_S

DEADLINES_S = (1.0, 4.0)  #: of the requests
PATIENT_S = 6.0  #: beyond its deadline, until a client gives up
PAUSE_S = (0.05, 0.15)  #: between two requests of a client
AFRESH_S = 0.05  #: after a connection has failed
TICK_S = 0.02
HOSTILE_PAUSE_S = (0.1, 0.3)
OK_JSON = b'{"x": [[0.0]]}'


class Reply(NamedTuple):
    """An HTTP answer: header names in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes


class Ask(NamedTuple):
    """A request to send: `question` is None for a hostile one, and `raw` then may be no HTTP at all."""

    model: str
    raw: bytes
    deadline_s: float
    question: int | None


@dataclass(slots=True)
class Connection:
    """One kept-alive connection."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    @property
    def is_open(self) -> bool:
        """As far as is known."""
        return not (self.reader.at_eof() or self.writer.is_closing())

    async def ask(self, raw: bytes) -> Reply:
        """Send and read the answer. Raises OSError, EOFError and ValueError where none comes whole."""
        self.writer.write(raw)
        lines = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = {
            name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:] if line)
        }
        body = await self.reader.readexactly(int(headers["content-length"]))
        if headers.get("connection", "").lower() == "close":
            self.writer.close()
        return Reply(int(lines[0].split()[1]), headers, body)


def format_request(model: str, body: bytes, deadline_s: float, more: str = "") -> bytes:
    """An invocation as HTTP."""
    head = (
        "POST /invocations HTTP/1.1\r\nHost: fleet\r\nContent-Type: application/json\r\n"
        f"X-Amzn-SageMaker-Target-Model: {model}\r\nX-Request-Timeout-Ms: {round(deadline_s * 1e3)}\r\n"
        f"{more}Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def make_hostile(name: str) -> Sequence[Ask]:
    """Requests that must be refused; `name` is a good model."""
    deadline_s = DEADLINES_S[-1]
    bodies = (b"{", b"\x00\xff" * 50, b'{"x": "words"}', b'{"x": [[NaN]]}', b"[" * 2000, b'{"x": [[1e999]]}', b"")
    asks = [Ask(name, format_request(name, body, deadline_s), deadline_s, None) for body in bodies]
    asks += [Ask(broken, format_request(broken, OK_JSON, deadline_s), deadline_s, None) for broken in BROKEN]
    asks.append(Ask("no-such.mar", format_request("no-such.mar", OK_JSON, deadline_s), deadline_s, None))
    asks.append(Ask("../../etc/passwd", format_request("../../etc/passwd", OK_JSON, deadline_s), deadline_s, None))
    asks.append(Ask("garbage", b"\x16\x03\x01 garbage\r\n\r\n", deadline_s, None))
    return asks


class Clients:
    """`with Clients(address, answers, seed) as clients`: they ask within the block. `records` are those so far."""

    def __init__(self, address: tuple[str, int], answers: Answers, seed: int, count: int = 6) -> None:
        self.records: list[Record] = []
        self._address, self._answers, self._seed, self._count = address, answers, seed, count
        self._names = sorted(answers.bodies)
        self._stop = threading.Event()
        self._stalled_s = 0.0
        self._thread = threading.Thread(target=self._run, name="clients")

    def __repr__(self) -> str:
        """For example `<Clients 812 requests>`."""
        return f"<Clients {len(self.records)} requests>"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive(), "every request ends, if only by the client's own time-out"

    def _run(self) -> None:
        asyncio.run(self._drive())

    async def _drive(self) -> None:
        watching = asyncio.create_task(self._watch_loop())
        hostile = make_hostile(self._names[0])
        async with asyncio.TaskGroup() as group:
            for index in range(self._count):
                group.create_task(self._keep_asking(random.Random(self._seed * 1000 + index), None))
            group.create_task(self._keep_asking(random.Random(self._seed * 1000 - 1), hostile))
        watching.cancel()

    async def _watch_loop(self) -> None:
        """Sum up how much later than asked the loop wakes up."""
        while True:
            began = time.monotonic()
            await asyncio.sleep(TICK_S)
            self._stalled_s += max(0.0, time.monotonic() - began - 2 * TICK_S)

    def _choose(self, rng: random.Random) -> Ask:
        """Popularity falls with the rank: a few models are hot, and all are asked."""
        rank = min(int(rng.paretovariate(0.5)) - 1, 10**6) % len(self._names)
        name, deadline_s = self._names[rank * 7 % len(self._names)], rng.choice(DEADLINES_S)
        question = rng.randrange(len(self._answers.bodies[name]))
        return Ask(name, format_request(name, self._answers.bodies[name][question], deadline_s), deadline_s, question)

    async def _keep_asking(self, rng: random.Random, hostile: Sequence[Ask] | None) -> None:
        connection: Connection | None = None
        while not self._stop.is_set():
            ask = self._choose(rng) if hostile is None else rng.choice(hostile)
            connection = await self._ask(ask, connection)
            if connection is None:
                await asyncio.sleep(AFRESH_S)
            await asyncio.sleep(rng.uniform(*(PAUSE_S if hostile is None else HOSTILE_PAUSE_S)))
        if connection is not None:
            connection.writer.close()

    async def _ask(self, ask: Ask, connection: Connection | None) -> Connection | None:
        """Ask once and record it. The connection, if it can be used again."""
        if connection is not None and not connection.is_open:
            connection.writer.close()
            connection = None
        sent, stalled = time.monotonic(), self._stalled_s
        told: dict[str, Any] = {"connected": connection is not None}
        try:
            async with asyncio.timeout(ask.deadline_s + PATIENT_S):
                if connection is None:
                    connection = Connection(*await asyncio.open_connection(*self._address))
                    told["connected"] = True
                reply = await connection.ask(ask.raw)
        except (OSError, EOFError, TimeoutError, ValueError, KeyError, IndexError) as error:
            told["detail"] = repr(error)[:200]
            if connection is not None:
                connection.writer.transport.abort()
            connection = None
        else:
            told |= self._read_reply(ask, reply)
            if not connection.is_open:
                connection = None
        ended, stalled = told.pop("ended", time.monotonic()), self._stalled_s - stalled
        record = Record(ask.model, sent, ended, ask.deadline_s, stalled_s=stalled, hostile=ask.question is None, **told)
        self.records.append(record)
        return connection

    def _read_reply(self, ask: Ask, reply: Reply) -> dict[str, Any]:
        """What the answer says, compared with what it must be."""
        told: dict[str, Any] = {"status": reply.status, "ended": time.monotonic()}
        if reply.status != 200:
            return {**told, "detail": reply.body[:300].decode(errors="replace")}
        agrees = frozenset[str]()
        if ask.question is not None:
            agrees = self._answers.find_agreeing(ask.model, ask.question, reply.body)
        return {**told, "version": reply.headers.get("x-fleetcast-model-version", ""), "agrees": agrees}

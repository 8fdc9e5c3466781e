"""JSON Lines for one forecaster, asked a line at a time so that each answer is there as soon as it is made.

Runs in a front. A worker batches requests of one model whoever sends them, so that lines that are under way together
run together, as those of one request do. Their errors are lines as well; only what is wrong with the server is raised.
"""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Iterator, Sequence

import msgspec

from server.errors import Refused, Situation
from server.front.inference import InferRequest, InferResponse
from server.front.inference_plane import InferencePlane
from server.front.json_cutter import NotJson, cut_fields, cut_items
from server.front.slices import ITEM, Slices

LINES = "application/jsonlines"
MOST_LINES = 1024  #: as many as a worker takes in one request
MOST_AHEAD = 32  #: lines that are under way, or whose answers wait for those before them
AHEAD_BYTES = 1024 * 1024  #: of answers that may wait, as large as those that came so far


class LineCalls:
    """The lines of one call. `request` is the whole call: each line is asked as it, with the line as its body."""

    def __init__(self, plane: InferencePlane, request: InferRequest, lines: Sequence[bytes]) -> None:
        self._plane, self._request = plane, request
        self._lines = lines
        self._most = 1  #: lines under way: the first goes alone, and says how large answers are

    def __repr__(self) -> str:
        """For example `<LineCalls of 500 lines, 32 ahead>`."""
        return f"<LineCalls of {len(self._lines)} lines, {self._most} ahead>"

    async def answers(self) -> AsyncGenerator[InferResponse]:
        """The answers in order. The caller reads each to its end, or cancels it. Raises Refused.

        What is under way when the caller closes this generator is given up.
        """
        ahead: deque[asyncio.Task[InferResponse]] = deque()
        sent = 0
        try:
            while ahead or sent < len(self._lines):
                while sent < len(self._lines) and len(ahead) < self._most:
                    ahead.append(asyncio.ensure_future(self._ask(self._lines[sent])))
                    sent += 1
                response = await self._wait_for(ahead[0], self._lines[sent - len(ahead)])
                ahead.popleft()
                self._most = max(1, min(MOST_AHEAD, AHEAD_BYTES // max(1, response.body_bytes)))
                yield response
        finally:
            await _give_up(ahead)

    async def _wait_for(self, asked: "asyncio.Task[InferResponse]", line: bytes) -> InferResponse:
        """The answer to a line. One that found no room because it was asked early is asked again in its turn."""
        try:
            return await asked
        except Refused as why:
            if why.situation is not Situation.OVERLOADED:
                raise
        return await self._ask(line)

    async def _ask(self, line: bytes) -> InferResponse:
        return await self._plane.infer(msgspec.structs.replace(self._request, body=line))


async def _give_up(ahead: deque[asyncio.Task[InferResponse]]) -> None:
    for task in ahead:
        task.cancel()
    for found in await asyncio.gather(*ahead, return_exceptions=True):
        if isinstance(found, InferResponse):
            found.cancel()


def split_lines(body: bytes) -> list[bytes] | None:
    """The lines of a body; None where they are not asked one by one: a worker says what is wrong with it as a whole."""
    count = body.count(b"\n") + (not body.endswith(b"\n"))
    if not 1 < count <= MOST_LINES:
        return None
    lines = bytes(body).removesuffix(b"\n").split(b"\n")
    return lines if all(line.strip() for line in lines) else None


def cut_instances(body: bytes) -> Slices[list[bytes]]:
    """The lines that a request of JSON is: an instance each, with the request's configuration. Raises Refused."""
    try:
        fields = yield from cut_fields(body)
        if "instances" not in fields:
            raise Refused(Situation.BAD_REQUEST, 'it is missing: a request is {"instances": [...]}', field="instances")
        instances = yield from cut_items(fields["instances"], MOST_LINES)
    except NotJson as error:
        raise Refused(Situation.BAD_REQUEST, f"the body is no JSON object of instances: {error}") from None
    other = next((key for key in fields if key not in ("instances", "configuration")), None)
    if other is not None:
        message = "there is no such key; there are instances, configuration"
        raise Refused(Situation.BAD_REQUEST, message, field=other[:100])
    configuration = bytes(fields.get("configuration", b"{}"))
    if not 1 <= len(instances) <= MOST_LINES:
        message = f"a request has 1 to {MOST_LINES} instances, not {'more' if instances else 0}"
        raise Refused(Situation.BAD_REQUEST, message, field="instances")
    if len(instances) * len(configuration) > len(body) + AHEAD_BYTES:
        message = f"{len(instances)} instances have {len(configuration)} bytes of configuration each; send fewer"
        raise Refused(Situation.TOO_LARGE, message, field="configuration")
    lines = list[bytes]()
    for line in _write_lines(instances, configuration):
        yield ITEM + len(line)
        lines.append(line)
    return lines


def _write_lines(instances: Sequence[msgspec.Raw], configuration: bytes) -> Iterator[bytes]:
    """INVARIANT: a line has no line feed; in JSON one can only stand between two tokens."""
    tail = b'"configuration":' + configuration + b"}"
    for i, raw in enumerate(instances):
        instance = bytes(raw).strip()
        if not (instance.startswith(b"{") and instance.endswith(b"}")):
            raise Refused(Situation.BAD_REQUEST, "an instance is an object", i)
        fields = instance[1:-1].strip()
        line = b"".join((b"{", fields, b"," if fields else b"", tail))
        yield line.translate(bytes.maketrans(b"\r\n", b"  "))

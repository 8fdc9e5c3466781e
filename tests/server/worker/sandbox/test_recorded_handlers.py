"""What handlers get and how they fail, as recorded from TorchServe 0.12.0 and Multi Model Server 1.1.11.

The handler is the one that answered the recordings, unchanged: it gives back what it was given.
"""

import asyncio
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import msgspec
import pytest

from server.code_messages import CodeAnswer, CodeRequest, encode_fields
from server.worker.sandbox.child_process import ChildEnded
from server.worker.sandbox.code_host import CodeHost
from tests.server.worker.sandbox.code_archives import NO_FIELDS, Asker, make_code_archive, start

pytestmark = pytest.mark.slow

GOLDEN = Path(__file__).parents[3] / "golden"
PROBE = (GOLDEN / "probe" / "probe_handler.py").read_text()
RECORDINGS = ("torchserve_0.12.0.jsonl", "mms_1.1.11.jsonl")
DIALECTS_OWN = {"explain", "url_path"}  #: header names that are the dialect's to add
BROKEN = {"die"}  #: the process ends: other tests say how that is answered


class Recorded(msgspec.Struct, frozen=True):
    """One recorded exchange."""

    api: str
    method: str
    path: str
    headers: dict[str, str]
    status: str
    resp_headers: list[tuple[str, str]]
    body: str | None = None
    resp_body: str | None = None


def read_recordings() -> Iterator[tuple[str, Recorded]]:
    """The exchanges in which the probe answered or failed."""
    for name in RECORDINGS:
        for line in (GOLDEN / name).read_text().splitlines():
            row = msgspec.json.decode(line, type=Recorded)
            mode = row.headers.get("X-Mode", "")
            if row.api == "inf" and (mode or '"sysprops"' in (row.resp_body or "")) and mode not in BROKEN:
                yield name, row


def make_request(row: Recorded, headers: Mapping[str, Any], data: Mapping[str, Any]) -> CodeRequest:
    """The recorded request as a front tells it. `headers` and `data`: what the handler saw, where it said that.

    What the recording's client has added to its headers (Host, Accept, Content-Length) is taken from there.
    """
    sent = {name: value for name, value in headers.items() if isinstance(value, str) and name not in DIALECTS_OWN}
    fields = {**sent, **row.headers} if sent else row.headers
    kept = {
        name.lower().encode(): value.encode("latin-1") for name, value in fields.items() if name != "content-length"
    }
    query = parse_qsl(urlsplit(row.path).query)
    return CodeRequest(
        "id",
        row.headers.get("Content-Type", ""),
        "*/*",
        (row.body or "").encode("latin-1"),
        encode_fields(kept),
        [each for each in query if each[0] in data],
        {name: headers[name] for name in headers if name in DIALECTS_OWN},
    )


async def answer(child: Asker, request: CodeRequest) -> CodeAnswer:
    """The child's answer to one request."""
    done: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    child.child.run([request], done.set_result)
    outcome = await asyncio.wait_for(done, 60)
    assert not isinstance(outcome, ChildEnded), outcome
    (found,) = outcome
    assert isinstance(found, CodeAnswer)
    return found


def test_a_handler_gets_what_was_recorded(host: CodeHost) -> None:
    """The parts and their types, and the headers with those of the parts: equal, by name and value."""
    rows = [(name, row) for name, row in read_recordings() if '"sysprops"' in (row.resp_body or "")]
    assert len(rows) > 25

    async def ask() -> None:
        child = Asker(start(host, make_code_archive(PROBE)))
        for name, row in rows:
            (expected,) = [json.loads(row.resp_body or "")]
            found = await answer(child, make_request(row, expected["headers"], expected["data"]))
            got = json.loads(found.body)
            assert got["data"] == expected["data"], (name, row.path)
            assert got["headers"] == expected["headers"], (name, row.path)
            assert (found.status, found.content_type, found.failed) == (200, "", False)
        await child.close()

    asyncio.run(ask())


def test_failures_and_what_a_handler_sets_are_as_recorded(host: CodeHost) -> None:
    """Status, reason, headers and body of each mode of the probe; a failure is told apart from an answer."""
    rows = [(name, row) for name, row in read_recordings() if "X-Mode" in row.headers]
    assert len(rows) > 10

    async def ask() -> None:
        child = Asker(start(host, make_code_archive(PROBE)))
        for name, row in rows:
            found = await answer(child, make_request(row, {}, {}))
            _, status, reason = row.status.split(" ", 2)
            said = dict(row.resp_headers)
            assert found.status == int(status), (name, row.headers)
            if '"InternalServerException"' in (row.resp_body or ""):
                assert (found.failed, found.message) == (True, json.loads(row.resp_body or "")["message"])
                continue
            assert (found.failed, found.reason) == (False, reason)
            assert found.body.decode("latin-1") == row.resp_body
            assert found.content_type == said.get("content-type", "")
            assert found.headers.get("X-Foo") == said.get("X-Foo")
        await child.close()

    asyncio.run(ask())


def test_malformed_json_ends_no_process(host: CodeHost) -> None:
    """Where Multi Model Server's worker died."""

    async def ask() -> None:
        child = Asker(start(host, make_code_archive(PROBE)))
        found = await answer(child, CodeRequest("id", "application/json", "", b"{bad", encode_fields({b"x-a": b"b"})))
        assert json.loads(found.body)["data"] == {"body": {"type": "bytearray", "value": "{bad"}}
        await child.close()

    asyncio.run(ask())


def test_a_form_that_cannot_be_read_fails_alone(host: CodeHost) -> None:
    """The others of its batch are answered, each with its own."""
    broken = CodeRequest("1", "multipart/form-data; boundary=b", "", b"--b\r\nno form", NO_FIELDS)
    sound = [CodeRequest(str(i), "text/plain", "", b"%d" % i, NO_FIELDS) for i in (0, 2)]

    async def ask() -> None:
        child = Asker(start(host, make_code_archive()))
        done: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        child.child.run([sound[0], broken, sound[1]], done.set_result)
        first, second, third = await asyncio.wait_for(done, 60)
        assert (first.body, third.body) == (b"0", b"2")
        assert (second.status, second.failed) == (400, True)
        assert "does not end with its boundary" in second.message
        await child.close()

    asyncio.run(ask())

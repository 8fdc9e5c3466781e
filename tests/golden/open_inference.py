"""Replays a recording of Triton: sends each exchange again, and says in what an answer differs from the recorded one.

Compared are the class of the status, and the body: its JSON by places such as `body/outputs/0/data`, and its binary
part. An error is compared by its shape: the words are each server's own. A table (TOML) lists the differences that are
meant, with their reasons. INVARIANT: a difference that no entry names fails, and so does an entry that names none.
"""

import base64
import gzip
import http.client
import json
import tomllib
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import msgspec

FOLDER = Path(__file__).parent
RECORDING, TABLE = FOLDER / "triton_2.51.0.jsonl", FOLDER / "triton_differences.toml"
ABSENT = "(absent)"
TIMEOUT_S = 120.0
JSON_BYTES = "inference-header-content-length"
UNPACK: Mapping[str, Callable[[bytes], bytes]] = {"gzip": gzip.decompress, "deflate": zlib.decompress}


class Recorded(msgspec.Struct, frozen=True):
    """One recorded exchange."""

    method: str
    path: str
    headers: dict[str, str] | None
    body_b64: str | None
    status: str
    resp_headers: list[tuple[str, str]]
    resp_b64: str | None

    @property
    def was_sent(self) -> bool:
        """Whether it was: the recording skipped one."""
        return self.status.startswith("HTTP/")


@dataclass(frozen=True, slots=True)
class Answered:
    """What a server has answered, recorded or now."""

    status: int
    headers: Mapping[str, str]  #: by lower-case name
    body: bytes

    def read(self) -> dict[str, Any]:
        """The body: `body`, JSON or text, and `binary`, what follows it."""
        body = self.body
        if coding := self.headers.get("content-encoding"):
            body = UNPACK[coding](body)
        size = int(self.headers.get(JSON_BYTES, len(body)))
        text = body[:size].decode()
        try:
            return {"body": json.loads(text), "binary": body[size:].hex()}
        except ValueError:
            return {"body": text, "binary": body[size:].hex()}


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One entry of the table. `exchanges`: numbers, from 0; `places`: patterns of places in them."""

    exchanges: list[int]
    places: list[str]
    why: str

    def names(self, exchange: int, place: str) -> bool:
        """Whether the entry is of this place of this exchange."""
        return exchange in self.exchanges and any(fnmatchcase(place, pattern) for pattern in self.places)


def read_recording() -> Sequence[Recorded]:
    """The exchanges, in the order in which they were sent."""
    return [msgspec.json.decode(line, type=Recorded) for line in RECORDING.read_text().splitlines()]


def read_table() -> list[Entry]:
    """The differences that are meant."""
    return msgspec.convert(tomllib.loads(TABLE.read_text())["differs"], list[Entry])


def send_again(address: tuple[str, int], recorded: Recorded) -> Answered:
    """Send a recorded request, byte by byte as it was."""
    connection = http.client.HTTPConnection(*address, timeout=TIMEOUT_S)
    try:
        connection.putrequest(recorded.method, recorded.path, skip_accept_encoding=True)
        for name, value in (recorded.headers or {}).items():
            connection.putheader(name, value)
        body = base64.b64decode(recorded.body_b64 or "")
        if recorded.method != "GET":
            connection.putheader("Content-Length", str(len(body)))
        connection.endheaders(body or None)
        answer = connection.getresponse()
        return Answered(answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read())
    finally:
        connection.close()


def read_answer(recorded: Recorded) -> Answered:
    """What was recorded."""
    headers = {name.lower(): value for name, value in recorded.resp_headers}
    return Answered(int(recorded.status.split()[1]), headers, base64.b64decode(recorded.resp_b64 or ""))


def find_differences(theirs: Answered, ours: Answered) -> dict[str, tuple[Any, Any]]:
    """Theirs and ours at each place where they are not equal. Bodies are compared where statuses are of a class."""
    if theirs.status // 100 != ours.status // 100:
        return {"status": (theirs.status, ours.status)}
    pair = theirs.read(), ours.read()
    if theirs.status >= http.client.BAD_REQUEST:
        pair = _blank_error(pair[0]), _blank_error(pair[1])
    return dict(_compare("", *pair))


def find_unnamed(table: Sequence[Entry], number: int, found: Mapping[str, tuple[Any, Any]]) -> Iterator[str]:
    """The differences that no entry names, in words."""
    for place, (theirs, ours) in found.items():
        if not any(entry.names(number, place) for entry in table):
            yield f"exchange {number}: {place} was {str(theirs)[:300]!r} and is {str(ours)[:300]!r}"


def find_stale(table: Sequence[Entry], found: Mapping[int, Mapping[str, object]]) -> Iterator[str]:
    """The entries that name no difference that was found: each exchange, and each pattern."""
    for entry in table:
        for number in entry.exchanges:
            if not any(entry.names(number, place) for place in found.get(number, ())):
                yield f"exchange {number}: nothing differs at {entry.places} ({entry.why})"
        for pattern in entry.places:
            if not any(fnmatchcase(place, pattern) for number in entry.exchanges for place in found.get(number, ())):
                yield f"{pattern}: nothing differs there ({entry.why})"


def _blank_error(read: dict[str, Any]) -> dict[str, Any]:
    """An error's body without its words."""
    body = read["body"]
    if isinstance(body, dict) and isinstance(body.get("error"), str):
        body = {**body, "error": ""}
    return {**read, "body": body}


def _compare(place: str, theirs: Any, ours: Any) -> Iterator[tuple[str, tuple[Any, Any]]]:
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for key in sorted(theirs.keys() | ours.keys()):
            inner = f"{place}/{key}".lstrip("/")
            yield from _compare(inner, theirs.get(key, ABSENT), ours.get(key, ABSENT))
    elif isinstance(theirs, list) and isinstance(ours, list):
        for i in range(max(len(theirs), len(ours))):
            pair = [values[i] if i < len(values) else ABSENT for values in (theirs, ours)]
            yield from _compare(f"{place}/{i}", *pair)
    elif theirs != ours or type(theirs) is not type(ours):
        yield place, (theirs, ours)

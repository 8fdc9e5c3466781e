"""Sends recorded requests again, and says in what an answer differs from the recorded one.

A difference is named by its place: `status`, `reason`, `header/NAME`, `body`, or `body/KEY/0/KEY` inside JSON. A table
(TOML) lists those that are meant, each with its reason, and those that vary by nature. INVARIANT: a difference that no
entry names fails, and so does an entry that names none.
"""

import http.client
import json
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import msgspec

FOLDER = Path(__file__).parent
ABSENT = "(absent)"
TIMEOUT_S = 120.0


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

    @property
    def sent(self) -> bytes:
        """The request's body."""
        return (self.body or "").encode("latin-1")


@dataclass(frozen=True, slots=True)
class Answered:
    """What a server has answered, recorded or now."""

    status: int
    reason: str
    headers: Mapping[str, str]  #: by lower-case name
    body: str


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One entry of a table. `exchanges`: numbers, from 0; empty for all. `places`: patterns of places.

    `ours`: what this server answers there, as a pattern too, where that is always the same.
    """

    places: list[str]
    why: str
    exchanges: list[int] = []
    ours: str = "*"

    def names(self, exchange: int, place: str) -> bool:
        """Whether the entry is of this place of this exchange."""
        return (not self.exchanges or exchange in self.exchanges) and any(
            fnmatchcase(place, pattern) for pattern in self.places
        )


class Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a replay may differ in. `left_out`: exchanges that are not sent, with the reason."""

    varies: list[Entry]
    differs: list[Entry]
    left_out: list[Entry] = []


def read_recording(name: str) -> Sequence[Recorded]:
    """The exchanges of a recording, in the order in which they were sent."""
    return [msgspec.json.decode(line, type=Recorded) for line in (FOLDER / name).read_text().splitlines()]


def read_table(name: str) -> Table:
    """The table of a recording."""
    return msgspec.convert(tomllib.loads((FOLDER / name).read_text()), Table)


def send_again(address: str, recorded: Recorded, body: bytes | None = None) -> Answered:
    """Send a recorded request to `address` (`http://host:port`), with what its client added to each.

    `body`: instead of the recorded one.
    """
    host = address.removeprefix("http://")
    sent = recorded.sent if body is None else body
    connection = http.client.HTTPConnection(host, timeout=TIMEOUT_S)
    try:
        connection.putrequest(recorded.method, recorded.path, skip_host=True, skip_accept_encoding=True)
        for name, value in {"Accept": "*/*", "Host": host, **recorded.headers}.items():
            connection.putheader(name, value)
        if sent:
            connection.putheader("Content-Length", str(len(sent)))
        connection.endheaders(sent or None)
        answer = connection.getresponse()
        headers = {name.lower(): value for name, value in answer.getheaders()}
        return Answered(answer.status, answer.reason, headers, answer.read().decode("utf-8", "replace"))
    finally:
        connection.close()


def read_answer(recorded: Recorded) -> Answered:
    """What was recorded."""
    _, _, line = recorded.status.partition(" ")
    status, _, reason = line.partition(" ")
    headers = {name.lower(): value for name, value in recorded.resp_headers}
    return Answered(int(status), reason, headers, recorded.resp_body or "")


def find_differences(theirs: Answered, ours: Answered) -> dict[str, tuple[str, str]]:
    """Theirs and ours at each place where they are not equal."""
    found: dict[str, tuple[Any, Any]] = {}
    if theirs.status != ours.status:
        found["status"] = theirs.status, ours.status
    if theirs.reason != ours.reason:
        found["reason"] = theirs.reason, ours.reason
    for name in theirs.headers.keys() | ours.headers.keys():
        pair = theirs.headers.get(name, ABSENT), ours.headers.get(name, ABSENT)
        if pair[0] != pair[1]:
            found[f"header/{name}"] = pair
    if theirs.body != ours.body:
        found |= _compare_bodies(theirs.body, ours.body)
    return {place: (str(pair[0]), str(pair[1])) for place, pair in found.items()}


def check_differences(table: Table, number: int, differences: Mapping[str, tuple[str, str]]) -> Iterator[str]:
    """The differences that no entry names, in words."""
    for place, (theirs, ours) in sorted(differences.items()):
        entries = [entry for entry in (*table.varies, *table.differs) if entry.names(number, place)]
        if not any(fnmatchcase(ours, entry.ours) for entry in entries):
            yield f"exchange {number}: {place} was {theirs[:300]!r} and is {ours[:300]!r}"


def find_stale(table: Table, found: Iterable[tuple[int, str]]) -> Iterator[str]:
    """The entries that name no difference that was found, given as exchange and place: each pattern and exchange."""
    places = list(found)
    for entry in (*table.varies, *table.differs):
        for pattern in entry.places:
            if not any(fnmatchcase(place, pattern) and entry.names(number, place) for number, place in places):
                yield f"{pattern}: nothing differs there ({entry.why})"
        for exchange in entry.exchanges:
            if not any(number == exchange and entry.names(number, place) for number, place in places):
                yield f"{entry.places} of exchange {exchange}: nothing differs there ({entry.why})"


def _compare_bodies(theirs: str, ours: str) -> dict[str, tuple[Any, Any]]:
    """Where two bodies differ: inside, where both are JSON; their layout is then a place of its own."""
    try:
        parsed = json.loads(theirs), json.loads(ours)
    except ValueError:
        return {"body": (theirs, ours)}
    found = dict(_compare_values("body", *parsed))
    if _is_pretty(theirs) != _is_pretty(ours):
        found["layout"] = _is_pretty(theirs), _is_pretty(ours)
    return found


def _compare_values(place: str, theirs: Any, ours: Any) -> Iterator[tuple[str, tuple[Any, Any]]]:
    if isinstance(theirs, dict) and isinstance(ours, dict):
        if list(theirs) != list(ours) and theirs.keys() == ours.keys():
            yield f"{place}/(order)", (list(theirs), list(ours))
        for key in sorted(theirs.keys() | ours.keys()):
            yield from _compare_values(f"{place}/{key}", theirs.get(key, ABSENT), ours.get(key, ABSENT))
    elif isinstance(theirs, list) and isinstance(ours, list):
        for i in range(max(len(theirs), len(ours))):
            pair = [values[i] if i < len(values) else ABSENT for values in (theirs, ours)]
            yield from _compare_values(f"{place}/{i}", *pair)
    elif theirs != ours or type(theirs) is not type(ours):
        yield place, (theirs, ours)


def _is_pretty(body: str) -> bool:
    """Whether JSON is laid out with two spaces of indent and ends with a line break."""
    return body.rstrip("\n") == json.dumps(json.loads(body), indent=2, ensure_ascii=False)

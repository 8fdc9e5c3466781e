"""The headers `traceparent` and `tracestate` of W3C Trace Context (level 2). Pure.

They come from strangers: what is malformed is as if it had not been sent, and never an error.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

TRACE_PARENT, TRACE_STATE = b"traceparent", b"tracestate"
MAX_PARENT, MAX_STATE, MOST_MEMBERS = 256, 512, 32  #: bytes of each header that is read, and members of a state
_PARENT = re.compile(rb"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?", re.DOTALL)
_NO_TRACE, _NO_SPAN, _NO_VERSION, _FIRST_VERSION = b"0" * 32, b"0" * 16, b"ff", b"00"
_SAMPLED = 1  # the bit of the flags
_MEMBER = re.compile(
    rb"([a-z][a-z0-9_\-*/]{0,255}|[a-z0-9][a-z0-9_\-*/]{0,240}@[a-z][a-z0-9_\-*/]{0,13})"
    rb"=[\x20-\x2b\x2d-\x3c\x3e-\x7e]{0,255}[\x21-\x2b\x2d-\x3c\x3e-\x7e]"
)


class TraceParent(NamedTuple):
    """The client's span, whose child a request is. Ids in lower-case hexadecimal; `state` as other systems left it."""

    trace_id: str
    span_id: str
    is_sampled: bool
    state: str = ""


def read_trace_parent(headers: Mapping[bytes, bytes]) -> TraceParent | None:
    """The client's span by its headers (names in lower case); None where it sent none that is valid."""
    raw = headers.get(TRACE_PARENT)
    if raw is None or len(raw) > MAX_PARENT:
        return None
    found = _PARENT.fullmatch(raw.strip(b" \t"))
    if found is None:
        return None
    version, trace_id, span_id, flags, more = found.groups()
    if version == _NO_VERSION or trace_id == _NO_TRACE or span_id == _NO_SPAN:
        return None
    if version == _FIRST_VERSION and more is not None:  # a later version may add fields behind these
        return None
    state = read_trace_state(headers.get(TRACE_STATE, b""))
    return TraceParent(trace_id.decode(), span_id.decode(), bool(int(flags, 16) & _SAMPLED), state)


def read_trace_state(raw: bytes) -> str:
    """The state as it is passed on; empty where a member is malformed, a key is there twice or it is too long."""
    if not raw or len(raw) > MAX_STATE:
        return ""
    members = [member for each in raw.split(b",") if (member := each.strip(b" \t"))]
    if len(members) > MOST_MEMBERS or not all(map(_MEMBER.fullmatch, members)):
        return ""
    if len({member.partition(b"=")[0] for member in members}) < len(members):
        return ""
    return b",".join(members).decode()

"""What the code of an archive is told of a request beside its body, and says of its answer: the records' bytes. Pure.

A front makes a `HandlerCall` of a request's head, and the worker gives it to the archive's process. What the process
says of its answer comes back as an `AnswerHead`, whose fields the worker has checked. Both travel only with requests
for models whose code may run: to any other model they are empty bytes.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

MAX_CALL = 16 * 1024  #: bytes of a `HandlerCall`
MAX_HEAD = 16 * 1024  #: bytes of an `AnswerHead`

Pairs = list[tuple[str, str]]


class CallTooLong(Exception):
    """A request has more header fields or parameters than travel to an archive's code; the message says the limit."""


class HandlerCall(Struct, frozen=True, array_like=True):
    """What a handler is told.

    `fields` are those of the request's head, encoded by `server.code_messages.encode_fields`. `parts` are its
    parameters that are data beside the body. `properties` are what the dialect adds to the headers, such as
    TorchServe's `explain` and `url_path`. `streams`: the dialect takes an answer part by part while it is made.
    """

    request_id: str
    fields: bytes
    parts: Sequence[tuple[str, str]] = []
    properties: Mapping[str, str] = {}
    streams: bool = False


class AnswerHead(Struct, frozen=True, array_like=True):
    """What a handler said of its answer. `content_type`: empty where it said none. `status`: 200 to 599."""

    status: Annotated[int, Meta(ge=200, le=599)] = 200
    reason: str = ""
    content_type: str = ""
    headers: Pairs = []


SAID_NOTHING = AnswerHead()  #: the head of most answers; nobody changes its headers

_encode = msgspec.msgpack.Encoder().encode
_decode_call = msgspec.msgpack.Decoder(HandlerCall).decode
_decode_head = msgspec.msgpack.Decoder(AnswerHead).decode
_NOTHING = _encode(SAID_NOTHING)


def encode_call(call: HandlerCall) -> bytes:
    """The bytes of a call. Raises CallTooLong."""
    encoded = _encode(call)
    if len(encoded) > MAX_CALL:
        raise CallTooLong(
            f"the header fields and parameters of a request for an archive with code have {len(encoded)} bytes, "
            f"{MAX_CALL} are allowed"
        )
    return encoded


def decode_call(encoded: bytes) -> HandlerCall:
    """The call of these bytes, which a front of ours has made."""
    return _decode_call(encoded)


def encode_head(head: AnswerHead) -> bytes:
    """The bytes of a head. INVARIANT: whoever makes it bounds its fields, so that they fit MAX_HEAD."""
    encoded = _NOTHING if head is SAID_NOTHING else _encode(head)
    assert len(encoded) <= MAX_HEAD, "an answer's head is bounded before it is encoded"
    return encoded


def decode_head(encoded: bytes) -> AnswerHead:
    """The head of these bytes, which a worker of ours has made."""
    return SAID_NOTHING if encoded == _NOTHING else _decode_head(encoded)

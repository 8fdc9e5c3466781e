"""A call for many models as one request between a front and a worker, and its answers as one response. Pure.

The body of the request is a head and the instances of the items, that of the response a head and the items' answers, in
the same order. Each item is queued, leased, counted, answered or refused in the worker as if it had come alone.

A head is a u32 (little-endian) with its length and one msgpack array. INVARIANT: fronts and workers of one server are
of one version, and only they speak this; all lengths are checked all the same.
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Generic, TypeVar

import msgspec
from msgspec import Struct

from server.errors import Situation
from server.ipc.frames import CacheResult, Count, Tier, WireError

TOGETHER = "application/vnd.fleetcast.together"  #: the content type of both bodies
PREDICTION = "application/vnd.fleetcast.prediction"  #: an item's answer that is the prediction itself, without a frame
MOST_ITEMS = 1024  #: of one request
LENGTH = 4  #: bytes before a head

_encode = msgspec.msgpack.Encoder().encode
Head = TypeVar("Head", bound=Struct)


class AskedTogether(Struct, array_like=True, forbid_unknown_fields=True):
    """The head of a request: the items' models and the bytes of their instances, and what all items share.

    `most_bytes`: of all answers together; beyond it the call is refused. `numbers`: predictions are wanted packed.
    """

    models: list[str]
    sizes: list[Count]
    configuration: bytes
    most_bytes: Count
    numbers: bool = False


class ItemAnswer(Struct, array_like=True, forbid_unknown_fields=True, gc=False):
    """What came of one item; see `server.ipc.frames.Response`. `size`: bytes of its answer, or of why there is none."""

    situation: Situation
    cache: CacheResult
    tier: Tier
    version: str
    content_type: str
    queue_us: Count
    load_us: Count
    inference_us: Count
    size: Count
    quality: str = ""
    warnings: str = ""


class AnsweredTogether(Struct, array_like=True, forbid_unknown_fields=True):
    """The head of a response."""

    items: list[ItemAnswer]


class _HeadReader(Generic[Head]):
    def __init__(self, kind: type[Head]) -> None:
        self._decode = msgspec.msgpack.Decoder(kind).decode

    def split(self, body: bytes) -> tuple[Head, memoryview]:
        """The head and what follows it. Raises WireError."""
        view = memoryview(body)
        end = LENGTH + int.from_bytes(view[:LENGTH], "little")
        if len(view) < LENGTH or end > len(view):
            raise WireError(f"a call of {len(view)} bytes has no head of {end - LENGTH} bytes")
        try:
            return self._decode(view[LENGTH:end]), view[end:]
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise WireError(f"the head of a call: {error}") from error


_asked, _answered = _HeadReader(AskedTogether), _HeadReader(AnsweredTogether)


def write_asked(head: AskedTogether, instances: Sequence[bytes | memoryview | msgspec.Raw]) -> bytes:
    """The body of a request."""
    packed = _encode(head)
    return b"".join((len(packed).to_bytes(LENGTH, "little"), packed, *instances))


def read_asked(body: bytes) -> tuple[AskedTogether, list[memoryview]]:
    """The head of a request, and the instance of each item. Raises WireError."""
    head, rest = _asked.split(body)
    if not 1 <= len(head.models) == len(head.sizes) <= MOST_ITEMS:
        raise WireError(f"a call of {len(head.models)} models and {len(head.sizes)} instances")
    return head, list(_cut(rest, head.sizes))


def write_answered(items: Sequence[ItemAnswer], bodies: Sequence[bytes]) -> bytes:
    """The body of a response."""
    packed = _encode(AnsweredTogether(list(items)))
    return b"".join((len(packed).to_bytes(LENGTH, "little"), packed, *bodies))


def read_answered(body: bytes, count: int) -> list[tuple[ItemAnswer, memoryview]]:
    """What came of each of `count` items, and its bytes. Raises WireError."""
    head, rest = _answered.split(body)
    if len(head.items) != count:
        raise WireError(f"{count} items are answered by {len(head.items)}")
    return list(zip(head.items, _cut(rest, [each.size for each in head.items]), strict=True))


def _cut(view: memoryview, sizes: Sequence[int]) -> Iterator[memoryview]:
    """Cut a body into parts of these sizes. Raises WireError unless they are all of it."""
    if sum(sizes) != len(view):
        raise WireError(f"parts of {sum(sizes)} bytes together do not make {len(view)} bytes")
    for end, size in zip(accumulate(sizes), sizes, strict=True):
        yield view[end - size : end]

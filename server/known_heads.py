"""Heads of requests that were read before: what they say, by their bytes. Pure; runs in every listener.

A client that keeps its connection mostly sends one head again and again, or one for each of its models. To read it
once more, to check it and to split its path is a sixth of what a front does for a request.

INVARIANT: a head is recalled only where the parser would read the same from the same bytes: at the start of a message,
together with all of its body, whose size its Content-Length says. The listener knows where a message starts.
"""

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from msgspec import Struct

from server.contract import HEADER_INFERENCE_COMPONENT, HEADER_TARGET_MODEL, HEADER_TIMEOUT_MS, raw_header
from server.request_head import HEADERS_BY_NAME

MOST_HEADS = 1024  #: that are known at a time, of which the oldest makes place
#: One of so many new heads takes the place of an old one. A client that asks more models in turn than are known would
#: otherwise find none of its heads, because each had to leave before it came again.
ONE_OF = 16
LONGEST_HEAD = 1024  #: bytes of a head that is known
LONGEST_BODY = 64 * 1024  #: bytes of its body: the listener pauses reading at a longer one
END = b"\r\n\r\n"  #: of a head
LENGTH = b"content-length"
#: A head with any other field is not kept: it may show credentials, which memory would hold when their client has left,
#: frame its body in another way, or differ with each request, as a request's id does.
KEPT_FIELDS = frozenset(
    {
        b"host", b"connection", b"user-agent", b"accept", b"accept-encoding", b"content-type", LENGTH,
        *map(raw_header, (HEADER_TARGET_MODEL, HEADER_INFERENCE_COMPONENT, HEADER_TIMEOUT_MS)),
    }
)  # fmt: skip


class KnownHead(Struct, frozen=True, gc=False):
    """What a head says. `scope`: the part of an ASGI scope that follows from it alone; nobody changes what is in it."""

    scope: Mapping[str, Any]
    body_bytes: int


class KnownHeads:
    """See the module."""

    def __init__(self) -> None:
        self._heads: OrderedDict[bytes, KnownHead] = OrderedDict()  # the oldest first
        self._new = 0  # heads that came when there was no place

    def __repr__(self) -> str:
        """For example `<KnownHeads 12>`."""
        return f"<KnownHeads {len(self._heads)}>"

    def __len__(self) -> int:
        return len(self._heads)

    def recall(self, data: bytes) -> tuple[KnownHead, bytes] | None:
        """The head and the body of the request that `data` is, and nothing else; None where its head is not known."""
        end = data.find(END, 0, LONGEST_HEAD) + len(END)
        known = self._heads.get(data[:end])
        if known is None or len(data) - end != known.body_bytes:
            return None
        return known, data[end:]

    def remember(self, data: bytes, scope: Mapping[str, Any]) -> None:
        """Know the head of the request that `data` is, unless it is too long or has other fields than `KEPT_FIELDS`.

        `scope`: see KnownHead. The request is sound, of HTTP/1.1, and its connection stays open after it. The parser
        has stood at the start of a message before `data`, and stands there again behind it.
        """
        if len(self._heads) >= MOST_HEADS:
            self._new += 1
            if self._new % ONE_OF:
                return
        by_name: Mapping[bytes, bytes] = scope[HEADERS_BY_NAME]
        end = data.find(END, 0, LONGEST_HEAD) + len(END)
        length = by_name.get(LENGTH, b"")
        if end < len(END) or not length.isdigit() or int(length) != len(data) - end or int(length) > LONGEST_BODY:
            return
        if len(by_name) < len(scope["headers"]) or not KEPT_FIELDS.issuperset(by_name):
            return
        if len(self._heads) >= MOST_HEADS:
            self._heads.popitem(last=False)
        self._heads[data[:end]] = KnownHead(scope, int(length))

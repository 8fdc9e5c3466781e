"""Rules that the head of every HTTP request must keep before any application sees it. Pure; runs in every listener.

Sources: RFC 9112 (3.2 Host, 6.1 Transfer-Encoding), RFC 9110 (5.3 field order). Two programs in a row that read one
head differently disagree on where a request ends or on which model it names: what can be read in two ways is refused.
"""

import re
from collections.abc import Mapping, Sequence

import msgspec

Fields = Sequence[tuple[bytes, bytes]]  #: header fields in the order received, names in lower case
Answer = tuple[int, list[tuple[bytes, bytes]], bytes]  #: status, headers, body

HEADERS_BY_NAME = "fleetcast.headers"  #: in the scope: the headers by lower-case name, of a repeated one the last
#: Fields of which one is used and a second one would be ignored.
SINGLE = frozenset(
    {
        b"host",
        b"authorization",
        b"content-encoding",
        b"content-type",
        b"x-amz-content-sha256",
        b"x-amz-date",
        b"x-amzn-sagemaker-target-model",
        b"x-request-timeout-ms",
    }
)
#: RFC 3986 authority without user information; empty where the target has none (RFC 9112, 3.2).
_HOST = re.compile(rb"(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._~!$&'()*+,;=%-]*)(?::[0-9]{0,5})?")


def find_fault(fields: Fields, by_name: Mapping[bytes, bytes], version: str) -> str | None:
    """What is wrong with a head of HTTP `version` (such as `1.1`), as a sentence for the client; None if it is sound.

    `by_name`: the fields by name, of a repeated one the last.
    The number of bytes of the head and its Content-Length are the parser's to check.
    """
    host, coded = by_name.get(b"host"), by_name.get(b"transfer-encoding", b"")
    if len(by_name) < len(fields):  # sound heads rarely repeat a name
        names = [name for name, _ in fields]
        twice = next((name for name in SINGLE if names.count(name) > 1), None)
        if twice is not None:
            return f"the header {twice.decode()} must be sent once, not {names.count(twice)} times"
        coded = b", ".join(value for name, value in fields if name == b"transfer-encoding")
    if host is None and version != "1.0":
        return "the header Host is missing: HTTP/1.1 requires it"
    if host is not None and _HOST.fullmatch(host) is None:
        return f"the header Host must be a host name or address with an optional port, not {_quote(host)}"
    if coded and version == "1.0":
        return "Transfer-Encoding needs HTTP/1.1; send Content-Length"
    if coded and coded.strip().lower() != b"chunked":
        return f"Transfer-Encoding must be chunked alone, not {_quote(coded)}; compress with Content-Encoding: gzip"
    return None


def body_framing(fields: Fields) -> bytes:
    """The header lines that say how a request's body is delimited; empty where it has none."""
    kept = [(name, value) for name, value in fields if name in (b"content-length", b"transfer-encoding")]
    return b"".join(name + b": " + value + b"\r\n" for name, value in kept)


def refuse_head(message: str) -> Answer:
    """The 400 that a faulty request is answered with, in a form that clients of every listener and dialect can read."""
    error = {"code": "bad_request", "message": message}
    body = msgspec.json.encode({"message": message, "error": error})
    headers = [
        (b"content-type", b"application/json"),
        (b"x-amzn-errortype", b"ValidationError"),
        (b"content-length", b"%d" % len(body)),
        (b"connection", b"close"),
    ]
    return 400, headers, body


def _quote(value: bytes) -> str:
    return repr(value[:80].decode("latin-1"))

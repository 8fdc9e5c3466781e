"""An S3 server of odd habits, in a thread: gateways, caches and small servers answer as S3 itself never does.

It speaks the little of S3 that a store reads: GET of an object and ListObjectsV2, in path and in virtual-hosted style.
`OddS3.habits` may be changed between requests.
"""

import hashlib
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from email.utils import format_datetime, parsedate_to_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal
from urllib.parse import parse_qs, quote, unquote, urlsplit
from xml.sax.saxutils import escape

from tests.http_servers import serve_on_thread

BUCKET = "fleet"


@dataclass
class Habits:
    """How it answers. `cuts`, `refusals` and `damages` are how many answers to come are cut, 503 or have a wrong byte.

    `swaps`: how many answers to come replace the object by its bytes reversed, a minute younger, before they leave.
    `circles`: each page of a listing is the first.
    """

    tags: Literal["strong", "weak", "none"] = "strong"
    ranges: bool = True
    chunked: bool = False
    last_modified: str = "Mon, 01 Jan 2024 00:00:00 GMT"
    cuts: int = 0
    refusals: int = 0
    damages: int = 0
    swaps: int = 0
    circles: bool = False

    def take(self, name: str) -> bool:
        """Whether this answer has the fault, counted down."""
        left: int = getattr(self, name)
        if left:
            setattr(self, name, left - 1)
        return left > 0


@dataclass
class OddS3:
    """A running server. `requests` are (method and path, Host, headers)."""

    endpoint_url: str = ""
    objects: dict[str, bytes] = field(default_factory=dict)
    habits: Habits = field(default_factory=Habits)
    requests: list[tuple[str, dict[str, str]]] = field(default_factory=list)

    def tag(self, key: str) -> str | None:
        """The ETag that the habits give the object."""
        strong = f'"{hashlib.md5(self.objects[key], usedforsecurity=False).hexdigest()}"'
        return {"strong": strong, "weak": f"W/{strong}", "none": None}[self.habits.tags]


@contextmanager
def odd_s3(tls: ssl.SSLContext | None = None) -> Iterator[OddS3]:
    """Start it on loopback; with `tls` it speaks https and is called `localhost`."""
    state = OddS3()
    server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"state": state}))
    if tls:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    host = "https://localhost" if tls else "http://127.0.0.1"
    state.endpoint_url = f"{host}:{server.server_port}"
    with serve_on_thread(server):
        yield state


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is the test's business."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1
    state: OddS3

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  the base class names it so
        """Silent: `OddS3.requests` is the log."""

    def do_GET(self) -> None:
        """An object, or a listing."""
        url = urlsplit(self.path)
        self.state.requests.append((self.path, {key.lower(): value for key, value in self.headers.items()}))
        path = url.path.removeprefix("/")
        if not (url.hostname or self.headers["Host"]).startswith(f"{BUCKET}."):
            path = path.removeprefix(BUCKET).removeprefix("/")
        if self.state.habits.take("refusals"):
            self._reply(503, b"", {})
        elif path:
            self._send_object(unquote(path))
        else:
            query = parse_qs(url.query)
            self._reply(200, _make_listing(self.state, query), {"Content-Type": "application/xml"})

    def _send_object(self, key: str) -> None:
        data = self.state.objects.get(key)
        if data is None:
            self._reply(404, b"<Error><Code>NoSuchKey</Code></Error>", {})
            return
        tag, habits = self.state.tag(key), self.state.habits
        headers = {"Last-Modified": habits.last_modified} | ({"ETag": tag} if tag else {})
        known, wanted = self.headers.get("If-None-Match"), self.headers.get("If-Match")
        if wanted and (wanted.startswith("W/") or wanted != tag):  # compared strongly, RFC 9110 13.1.1
            self._reply(412, b"", {})
        elif known and tag and known.removeprefix("W/") == tag.removeprefix("W/"):
            self._reply(304, b"", headers)
        else:
            if habits.take("swaps"):
                self.state.objects[key] = data[::-1]
                habits.last_modified = _add_minute(habits.last_modified)
            self._send_bytes(data, headers)

    def _send_bytes(self, data: bytes, headers: dict[str, str]) -> None:
        body, status = data, 200
        asked = self.headers.get("Range")
        if asked and self.state.habits.ranges:
            first, last = asked.removeprefix("bytes=").split("-")
            body, status = data[int(first) : int(last) + 1], 206
            headers["Content-Range"] = f"bytes {first}-{int(first) + len(body) - 1}/{len(data)}"
        if self.state.habits.take("damages"):
            at = len(body) // 2 + self.state.habits.damages % 50  # each time another one
            body = body[:at] + bytes([body[at] ^ 1]) + body[at + 1 :]
        self._reply(status, body, headers, cut=self.state.habits.take("cuts"))

    def _reply(self, status: int, body: bytes, headers: dict[str, str], *, cut: bool = False) -> None:
        self.send_response_only(status)
        chunked = self.state.habits.chunked and status in (200, 206)
        for name, value in headers.items():
            self.send_header(name, value)
        if chunked:
            self.send_header("Transfer-Encoding", "chunked")
        elif status != 304:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        whole = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body) if chunked and body else body
        self.wfile.write(whole[: len(whole) // 2] if cut else whole)
        self.close_connection = cut


def _add_minute(date: str) -> str:
    return format_datetime(parsedate_to_datetime(date) + timedelta(minutes=1), usegmt=True)


def _make_listing(state: OddS3, query: dict[str, list[str]]) -> bytes:
    """The objects in pages of three; keys are URL-encoded where that is asked for, as S3 does."""
    prefix, after = query.get("prefix", [""])[0], unquote(query.get("continuation-token", [""])[0])
    if state.habits.circles:
        after = ""
    encode = quote if query.get("encoding-type") == ["url"] else escape
    keys = sorted(key for key in state.objects if key.startswith(prefix) and key > after)
    rows = "".join(
        f"<Contents><Key>{encode(key)}</Key><Size>{len(state.objects[key])}</Size>"
        f"<ETag>{escape(state.tag(key) or '')}</ETag><LastModified>2024-01-01T00:00:00.000Z</LastModified></Contents>"
        for key in keys[:3]
    )
    further = f"<NextContinuationToken>{quote(keys[2])}</NextContinuationToken>" if len(keys) > 3 else ""
    encoding = "<EncodingType>url</EncodingType>" if encode is quote else ""
    return (
        f"<ListBucketResult><Name>{BUCKET}</Name><IsTruncated>{str(len(keys) > 3).lower()}</IsTruncated>{encoding}"
        f"{further}{rows}</ListBucketResult>"
    ).encode()

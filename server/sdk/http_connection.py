"""HTTP to one Fleetcast listener: connections are kept and shared, retries follow the server's advice. Thread-safe."""

import json
import ssl
from collections.abc import Mapping
from typing import Any, Self
from urllib.parse import urlsplit

import urllib3
from urllib3.exceptions import HTTPError, MaxRetryError
from urllib3.util import Retry

from server.contract import HEADER_ERROR_TYPE, HEADER_RETRY_AFTER_MS
from server.sdk.errors import Unreachable, error_from_reply

OK = 200
TRY_AGAIN = (429, 503)  #: statuses by which a server says that the same request may succeed later
BACKOFF_FACTOR = 0.1  #: s, doubled with each retry, where the server gives no advice
MOST_RETRY_AFTER_S = 10


class _AdvisedRetry(Retry):
    """Retries after as many milliseconds as the server says, else after its whole seconds, else with back-off."""

    def get_retry_after(self, response: urllib3.BaseHTTPResponse) -> float | None:
        """Seconds, None without advice."""
        advice = response.headers.get(HEADER_RETRY_AFTER_MS)
        seconds = int(advice) / 1000 if advice and advice.isdecimal() else super().get_retry_after(response)
        return None if seconds is None else min(seconds, MOST_RETRY_AFTER_S)


class HttpConnection:
    """A pool of connections to the listener at `url`, which may have a path of its own."""

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float,
        retries: int,
        connections: int,
        token: str | None = None,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        """`token` goes with each request. Raises ValueError for a URL that is not one of HTTP."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise ValueError(f"{url!r} is not the address of a server; give one such as http://127.0.0.1:8080")
        self.url = url
        self._prefix = parts.path.rstrip("/")
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        # A forecast has no effects, so that a request whose connection broke may be sent again.
        retry = _AdvisedRetry(
            total=retries,
            allowed_methods=None,
            status_forcelist=TRY_AGAIN,
            backoff_factor=BACKOFF_FACTOR,
            raise_on_status=False,
        )
        self._pool = urllib3.connection_from_url(
            f"{parts.scheme}://{parts.netloc}",
            maxsize=connections,
            timeout=urllib3.Timeout(connect=min(timeout_s, 10.0), read=timeout_s),
            retries=retry,
            **({"ssl_context": ssl_context} if parts.scheme == "https" else {}),
        )

    def __repr__(self) -> str:
        return f"<HttpConnection {self.url}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections that are idle."""
        self._pool.close()

    def request(
        self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> urllib3.BaseHTTPResponse:
        """A reply with status 200. Raises FleetcastError: what the server says, or Unreachable."""
        try:
            sent = {**(headers or {}), **self._headers}
            reply = self._pool.urlopen(method, self._prefix + path, body=body, headers=sent)
        except HTTPError as error:
            cause = error.reason if isinstance(error, MaxRetryError) else error
            raise Unreachable(f"{self.url}: {cause} (is `fleetcast serve` running there?)") from error
        if reply.status != OK:
            raise error_from_reply(reply.status, reply.headers.get(HEADER_ERROR_TYPE, ""), _decode_body(reply.data))
        return reply


def _decode_body(body: bytes) -> Any:
    """JSON, or the text that stands there instead."""
    try:
        return json.loads(body)
    except ValueError:
        return body.decode(errors="replace")[:200]

"""The inference listener: bare ASGI, one class, no torch, bodies untouched (CONTRACTS 1; many models in one call, 5).

Runs in a front process. A request's life here: read the header, bound and read the body, route, forward the bytes,
return the bytes that come back with headers that say what happened.
"""

import asyncio
import itertools
import os
import re
import time
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any

import msgspec
import structlog

from model_store.names import InvalidModelName, ModelName, parse_model_name
from server.errors import Refused, SageMakerCode, Situation, sagemaker_error
from server.front import fan_out as together
from server.front.auth.sigv4 import Signatures
from server.front.dataplane import Calls, ClientGone, Receive, refusal
from server.front.dialects import forecasts
from server.front.fan_out import JSON, NPY, Limit
from server.front.worker_client import Call, Link, WorkerLost
from server.ipc import frames as wire
from server.metrics import FrontMetrics
from server.settings import Settings

log = structlog.get_logger()

Scope = MutableMapping[str, Any]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]
Forward = Callable[[Scope, dict[bytes, bytes], Headers, Receive, Send], Awaitable[Sequence[int]]]

MAX_HEADER = 1024
MAX_NAMES = 50_000
CLIENT_GONE = 499  # counted, never sent; the number is nginx's
TOO_MANY = 429
_ENDPOINT = re.compile(r"/endpoints/[A-Za-z0-9](?:-?[A-Za-z0-9]){0,62}/invocations")
_CACHE = {wire.CacheResult.HIT: b"hit", wire.CacheResult.MISS: b"miss", wire.CacheResult.COALESCED: b"coalesced"}
_TIER = {wire.Tier.HOST: "host", wire.Tier.DISK: "disk", wire.Tier.STORE: "store"}
_PING = b'{"status": "Healthy"}\n'
_VARIANT = (b"x-amzn-invoked-production-variant", b"AllTraffic")


class App:
    """One front's ASGI application over its `calls` to the workers."""

    def __init__(self, settings: Settings, metrics: FrontMetrics) -> None:
        self.calls = Calls()
        self._settings = settings
        self._metrics = metrics
        self._signatures = Signatures(settings.access_keys) if settings.access_keys else None
        self._held = 0
        self._names: dict[bytes, ModelName] = {}
        self._ids = itertools.count(1)
        self._id_prefix = os.urandom(6).hex()
        self._max_body = Limit(int(settings.max_body_bytes), "max_body_bytes")
        self._max_forecasts = Limit(int(settings.max_forecasts_bytes), "max_forecasts_bytes")

    def __repr__(self) -> str:
        """For example `<App <Calls 2 links, 12 under way>, 12000 bytes held>`."""
        return f"<App {self.calls!r}, {self._held} bytes held>"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One ASGI connection scope; only HTTP is served."""
        if scope["type"] != "http":
            return
        path: str = scope["path"]
        if path == "/invocations" or _ENDPOINT.fullmatch(path):
            await self._answer("sagemaker", self._forward, scope, receive, send)
        elif path == "/v1/forecasts":
            await self._answer("forecasts", self._forecasts, scope, receive, send)
        elif path == "/ping":
            await _reply(send, 200, [(b"content-type", b"application/json")], _PING)
        elif path == "/ready":
            up = len(self.calls.router.lanes)
            body = msgspec.json.encode({"ready": bool(up), "workers": up})
            await _reply(send, 200 if up else 503, [(b"content-type", b"application/json")], body)
        else:
            places = "/endpoints/NAME/invocations, /invocations or, for many models in one, /v1/forecasts"
            message = f"no such path: {path[:200]}; requests go to {places}"
            await self._refuse(send, Refused(Situation.NO_ROUTE, message), [])

    async def _answer(self, protocol: str, forward: Forward, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one call, whatever happens, and count what became of it."""
        started = time.perf_counter()
        headers: dict[bytes, bytes] = dict(scope["headers"])
        extra = self._echoes(headers)
        try:
            _require_post(scope)
            statuses = await forward(scope, headers, extra, receive, send)
        except Refused as refused:
            statuses = [await self._refuse(send, refused, extra)]
        except ClientGone:
            statuses = [CLIENT_GONE]
        except asyncio.CancelledError:  # uvicorn's, when `drain_s` is over
            stopping = Refused(Situation.NOT_READY, "the server is stopping; try again")
            statuses = [await self._refuse(send, stopping, extra)]
        except Exception:  # a bug of ours costs this request alone
            log.exception("request_failed")
            broken = Refused(Situation.INTERNAL, "the server failed; its log says why")
            statuses = [await self._refuse(send, broken, extra)]
        seconds = time.perf_counter() - started
        for status in statuses:
            self._metrics.answered(protocol, status, seconds)

    async def _forward(
        self, scope: Scope, headers: dict[bytes, bytes], extra: Headers, receive: Receive, send: Send
    ) -> Sequence[int]:
        """One model's call."""
        link, call, response = await self._ask(scope, headers, receive)
        if response.situation:
            refused = await refusal(link, call, response)
            return [await self._refuse(send, refused, extra + _story(response))]
        await self._stream(send, link, call, response, extra)
        return [200]

    async def _ask(
        self, scope: Scope, headers: dict[bytes, bytes], receive: Receive
    ) -> tuple[Link, Call, wire.Response]:
        """The request, checked and sent to a worker; its response."""
        model = self._model(headers.get(b"x-amzn-sagemaker-target-model"))
        deadline = time.monotonic() + self._timeout(headers.get(b"x-request-timeout-ms"))
        content_type, accept = _header(headers, b"content-type"), _header(headers, b"accept")
        body = await self._signed_body(scope, headers, receive, self._max_body)
        self._held += len(body)
        try:
            self._check_held()
            return await self.calls.ask(model, content_type, accept, deadline, body, receive)
        finally:
            self._held -= len(body)

    async def _signed_body(self, scope: Scope, headers: dict[bytes, bytes], receive: Receive, limit: Limit) -> bytes:
        body = await self._body(headers.get(b"content-length"), receive, limit)
        if self._signatures is not None:
            self._signatures.check(scope["method"], scope["path"], scope.get("query_string", b""), headers, body)
        return body

    async def _forecasts(
        self, scope: Scope, headers: dict[bytes, bytes], extra: Headers, receive: Receive, send: Send
    ) -> Sequence[int]:
        """A call for many models."""
        deadline = time.monotonic() + self._timeout(headers.get(b"x-request-timeout-ms"))
        wanted = NPY if NPY in _header(headers, b"accept").lower() else JSON
        body = await self._signed_body(scope, headers, receive, self._max_forecasts)
        self._held += len(body)
        try:
            self._check_held()
            found = await together.answer(self.calls, body, wanted, self._max_forecasts, deadline, receive)
        finally:
            self._held -= len(body)
        head = [(b"content-type", found.media.encode()), *extra, *forecasts.story(found.found)]
        await _reply(send, 200, head, found.body)
        return forecasts.statuses(found.found)

    # --- parts of a request -----------------------------------------------------------------------------------------

    def _model(self, raw: bytes | None) -> ModelName:
        if raw is None:
            raise Refused(Situation.NO_TARGET, "no target model: send the header X-Amzn-SageMaker-Target-Model")
        name = self._names.get(raw)
        if name is None:
            try:
                name = parse_model_name(raw.decode())
            except (InvalidModelName, UnicodeDecodeError) as error:
                raise Refused(Situation.BAD_NAME, f"X-Amzn-SageMaker-Target-Model: {error}") from error
            if len(self._names) >= MAX_NAMES:
                self._names.clear()
            self._names[raw] = name
        return name

    def _timeout(self, raw: bytes | None) -> float:
        """Seconds: what the client asks for, at most what the operator allows."""
        longest = self._settings.request_timeout_s
        if raw is None:
            return longest
        if not re.fullmatch(rb"0{0,9}[1-9][0-9]{0,9}", raw):
            message = (
                f"X-Request-Timeout-Ms must be a positive number of milliseconds, not {raw[:40].decode('latin-1')!r}"
            )
            raise Refused(Situation.BAD_REQUEST, message)
        return min(int(raw) / 1e3, longest)

    async def _body(self, announced: bytes | None, receive: Receive, limit: Limit) -> bytes:
        if announced is not None and announced.isdigit():
            limit.check(int(announced))
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        body: bytes = message.get("body", b"")
        if not message.get("more_body"):
            limit.check(len(body))
            return body
        try:
            async with asyncio.timeout(self._settings.client_timeout_s):
                return await self._long_body(body, receive, limit)
        except TimeoutError:
            message_text = f"the body did not arrive within {self._settings.client_timeout_s:g} s (client_timeout_s)"
            raise Refused(Situation.SLOW_CLIENT, message_text) from None

    async def _long_body(self, first: bytes, receive: Receive, limit: Limit) -> bytes:
        parts, size, more = [first], len(first), True
        self._held += size
        try:
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone
                part = message.get("body", b"")
                parts.append(part)
                size += len(part)
                self._held += len(part)
                limit.check(size)
                self._check_held()
                more = message.get("more_body", False)
            return b"".join(parts)
        finally:
            self._held -= size

    def _check_held(self) -> None:
        """Bodies that are still on their way are memory too. Raises Refused."""
        if self._held > self._settings.max_inflight_bytes:
            raise Refused(Situation.OVERLOADED, "this front holds max_inflight_bytes of requests already")

    def _echoes(self, headers: dict[bytes, bytes]) -> Headers:
        """Headers that every answer carries whatever happens to the request."""
        given = headers.get(b"x-request-id", b"")
        ident = given if 0 < len(given) <= MAX_HEADER else f"{self._id_prefix}-{next(self._ids)}".encode()
        extra = [(b"x-request-id", ident), _VARIANT]
        custom = headers.get(b"x-amzn-sagemaker-custom-attributes")
        if custom is not None and len(custom) <= MAX_HEADER:
            extra.append((b"x-amzn-sagemaker-custom-attributes", custom))
        return extra

    # --- parts of an answer -----------------------------------------------------------------------------------------

    async def _stream(self, send: Send, link: Link, call: Call, response: wire.Response, extra: Headers) -> None:
        """The answer; a large one part by part, as fast as the client takes it (the listener bounds how slow)."""
        head: Headers = [
            (b"content-type", response.content_type.encode()),
            (b"content-length", b"%d" % response.body_bytes),
            *extra,
            *_story(response),
        ]
        more = call.unread > 0
        try:
            await send({"type": "http.response.start", "status": 200, "headers": head})
            await send({"type": "http.response.body", "body": response.body, "more_body": more})
            if more:
                async for part in link.rest(call):
                    await send({"type": "http.response.body", "body": part, "more_body": call.unread > 0})
        except (WorkerLost, RuntimeError):  # the second is uvloop's word for a connection that the listener has cut off
            link.cancel(call)
            raise ClientGone from None

    async def _refuse(self, send: Send, refused: Refused, extra: Headers) -> int:
        code = None
        if refused.situation is Situation.OVERLOADED and self._settings.overload_status == TOO_MANY:
            code = SageMakerCode(TOO_MANY, "ModelNotReadyException", retry_after_ms=200)
        status, headers, body = sagemaker_error(refused.situation, refused.detail, code)
        if refused.situation is Situation.SLOW_CLIENT:
            headers.append((b"connection", b"close"))  # the rest of its body is of no use
        await _reply(send, status, headers + extra, body)
        return status


def _story(response: wire.Response) -> Headers:
    """Headers that say what happened: cache, version, times in milliseconds."""
    times = f"queue;dur={response.queue_us / 1e3:.3f}, "
    if response.load_us:
        times += f'load;dur={response.load_us / 1e3:.3f};desc="{_TIER.get(wire.Tier(response.tier), "")}", '
    times += f"inference;dur={response.inference_us / 1e3:.3f}"
    story = [(b"server-timing", times.encode())]
    if response.cache:
        story.append((b"x-fleetcast-cache", _CACHE[wire.CacheResult(response.cache)]))
    if response.version:
        story.append((b"x-fleetcast-model-version", response.version.encode()))
    return story


def _require_post(scope: Scope) -> None:
    if scope["method"] != "POST":
        raise Refused(Situation.BAD_METHOD, f"requests are POSTed, not {scope['method']}")


def _header(headers: dict[bytes, bytes], name: bytes) -> str:
    raw = headers.get(name, b"")
    if len(raw) > MAX_HEADER:
        raise Refused(Situation.BAD_REQUEST, f"the header {name.decode()} is longer than {MAX_HEADER} bytes")
    return raw.decode("latin-1")


async def _reply(send: Send, status: int, headers: Headers, body: bytes) -> None:
    head = [*headers, (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": head})
    await send({"type": "http.response.body", "body": body})

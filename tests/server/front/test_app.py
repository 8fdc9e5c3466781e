"""The app over its dialects: a new one is a file and a line, and what the app does for all of them."""

import asyncio
import json
import socket
import time
from collections.abc import Mapping
from typing import Any, cast

import httpx
import pytest

from model_store.names import parse_model_name
from server.errors import Refused, Situation
from server.front.app import App
from server.front.dialects import DIALECTS
from server.front.exchange import DialectOperation, Headers, HttpReply, HttpRequest, Limit
from server.front.inference import InferRequest
from server.front.inference_plane import InferencePlane
from server.http_exchange import REASON
from server.http_listener import make_listener
from server.metrics import FrontMetrics
from server.routes.record import Protocol, Route
from server.settings import Settings
from tests.server.front.answering import JSON, Answered, Worker, ask, attach

TARGET = {"X-Amzn-SageMaker-Target-Model": "m.mar"}
SETTINGS = Settings.model_validate({"store": "models", "max_body_bytes": 1000, "max_inflight_bytes": 5000})


class Toy:
    """A protocol of `POST /toy/MODEL`, whose errors are plain text."""

    name = "toy"
    routes = Protocol(
        "toy", "Toy", "tests", (Route("POST", "/toy/{model}", "invoke", "Ask a model"),), (500,), "any_object"
    )

    def __init__(self, settings: Settings) -> None:
        self._limit = Limit(int(settings.max_body_bytes), "max_body_bytes")

    def match(self, method: str, path: str, query: bytes = b"") -> DialectOperation | None:
        """Any method."""
        del method, query
        return DialectOperation(path.removeprefix("/toy/"), self._limit) if path.startswith("/toy/") else None

    async def answer(self, operation: DialectOperation, request: HttpRequest, plane: InferencePlane) -> HttpReply:
        """The model's answer in brackets."""
        if operation.name == "teapot":
            return HttpReply(418, "", request.query, reason="teapot")
        model = parse_model_name(operation.name)
        response = await plane.infer(InferRequest(model, request.body, JSON, JSON, request.deadline))
        return HttpReply(203, "text/toy", b"<" + await response.read() + b">", stats=response.stats)

    def refused(self, why: Refused, request: HttpRequest) -> HttpReply:
        """The situation's number."""
        del request
        return HttpReply(500 + why.situation, "text/plain", str(why).encode(), [(b"x-toy", b"no")])


def make_app(worker: Worker | None = None) -> App:
    """The app with the toy among its dialects."""
    made = App(SETTINGS, FrontMetrics(), (Toy, *DIALECTS))
    attach(made.plane, *([worker] if worker else []))
    return made


def ask_once(
    made: App, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None
) -> Answered:
    """One request."""
    return asyncio.run(ask(made, method, path, body, headers))


def count_requests(made: App) -> list[str]:
    """The app's counters of requests that have counted any."""
    lines = made._metrics.text().splitlines()
    counters = [line for line in lines if line.startswith("fleetcast_inference_requests_total{")]
    return [line for line in counters if not line.endswith(" 0.0")]


def test_a_new_dialect_is_served_over_a_socket() -> None:
    """A dialect in the registry is asked by HTTP: its paths, its replies, its errors, its label in the metrics."""

    async def scenario() -> None:
        made = make_app(Worker(lambda asked: asked.body.upper()))
        server, sock = make_listener(made, 1.0, 5.0, 5), socket.create_server(("127.0.0.1", 0))
        serving = asyncio.create_task(server.serve(sockets=[sock]))
        port = sock.getsockname()[1]
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
            good = await client.post("/toy/au/m.mar", content=b"abc")
            large = await client.post("/toy/au/m.mar", content=bytes(1001))
            nowhere = await client.get("/toys")
        server.should_exit = True
        await serving
        assert (good.status_code, good.content, good.headers["content-type"]) == (203, b"<ABC>", "text/toy")
        assert good.headers["x-fleetcast-cache"] == "hit"
        assert good.headers["server-timing"] == "queue;dur=1.500, inference;dur=0.020"
        assert (large.status_code, large.headers["x-toy"]) == (500 + Situation.TOO_LARGE, "no")
        assert "/toy/MODEL" in nowhere.json()["message"]
        assert count_requests(made) == [
            'fleetcast_inference_requests_total{code="203",protocol="toy"} 1.0',
            'fleetcast_inference_requests_total{code="504",protocol="toy"} 1.0',
        ]

    asyncio.run(scenario())


@pytest.mark.parametrize("path", ["/invocations", "/v1/forecasts", "/ping", "/ready", "/toy/m.mar", "/nowhere"])
def test_every_answer_has_a_request_id(path: str) -> None:
    """The one that was sent, else one of its own."""
    made = make_app(Worker(lambda _: b"1"))
    assert ask_once(made, "POST", path, headers={"X-Request-Id": "ours"}).headers["x-request-id"] == "ours"
    ids = {ask_once(made, "POST", path).headers["x-request-id"] for _ in range(3)}
    assert len(ids) == 3
    assert all(ids)


def test_probes_are_open_and_not_counted() -> None:
    """They are answered whatever their headers and methods are; `/ready` by whether a worker is there."""
    made = make_app()
    assert ask_once(made, "GET", "/ping", headers={"X-Request-Timeout-Ms": "soon"}).status == 200
    assert (ask_once(made, "GET", "/ready").status, ask_once(make_app(Worker(str)), "HEAD", "/ready").status) == (
        503,
        200,
    )
    assert ask_once(made, "GET", "/nowhere").status == 404
    assert count_requests(made) == []


def test_a_reply_has_the_reason_and_the_type_that_its_dialect_says() -> None:
    """A type that is empty leaves the header out; the query is the request's."""
    sent: list[dict[str, object]] = []

    async def receive() -> dict[str, object]:
        return {"type": "http.request", "body": b""}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "GET", "path": "/toy/teapot", "query_string": b"a=b", "headers": []}
    asyncio.run(make_app()(scope, receive, send))
    start, body = sent
    assert (start["status"], start[REASON], body["body"]) == (418, "teapot", b"a=b")
    assert b"content-type" not in dict(cast("Headers", start["headers"]))


def test_a_bug_costs_one_request() -> None:
    """An exception that is no refusal is an internal error in the dialect's own words; its text stays in the log."""
    made = make_app()
    reply = ask_once(made, "POST", "/toy/..")
    assert (reply.status, reply.body) == (500 + Situation.INTERNAL, b"the server failed; its log says why")
    assert ask_once(made, "POST", "/toy/m.mar").status == 500 + Situation.NOT_READY


def test_a_worker_refuses_in_each_dialect() -> None:
    """The same refusal, with what happened in the headers, in each protocol's own shape."""
    made = make_app(Worker(lambda _: (Situation.NOT_FOUND, b'{"message":"no such"}')))
    sagemaker = ask_once(made, "POST", "/invocations", headers=TARGET)
    assert (sagemaker.status, sagemaker.headers["x-amzn-errortype"]) == (400, "ValidationError")
    toy = ask_once(made, "POST", "/toy/m.mar")
    assert (toy.status, toy.body) == (505, b"no such")
    assert sagemaker.headers["server-timing"] == toy.headers["server-timing"]
    forecasts = ask_once(made, "POST", "/v1/forecasts", b'{"requests":[{"target_model":"m.mar"}]}')
    assert forecasts.status == 200
    error = {"code": "not_found", "message": "no such"}
    assert json.loads(forecasts.body) == {"predictions": [{"error": error}], "failed": 1}


def test_large_answers_stream() -> None:
    """Part by part under one Content-Length; when the worker dies on the way the connection ends, counted as 499."""
    worker = Worker(lambda _: [b"one", b"two", b"three"])
    made = make_app(worker)
    reply = ask_once(made, "POST", "/invocations", headers=TARGET)
    assert (reply.body, reply.headers["content-length"]) == (b"onetwothree", "11")
    worker.answer = lambda _: [b"one", b""]
    assert ask_once(made, "POST", "/invocations", headers=TARGET).body == b"one"
    assert worker.cancelled == 1
    assert count_requests(made) == [
        'fleetcast_inference_requests_total{code="200",protocol="sagemaker"} 1.0',
        'fleetcast_inference_requests_total{code="499",protocol="sagemaker"} 1.0',
    ]
    assert repr(made).startswith(
        "<App toy, sagemaker, forecasts, actuals, nixtla, mlflow, kserve, sagemaker_streams, v2, health, torchserve "
        "over <DataPlane 1 links, 0 under way, 0 bytes"
    )


def test_no_answer_leaves_as_a_success_after_its_deadline() -> None:
    """The client of a worker that answers late reads of the deadline, in its dialect, and what streams is ended."""

    def answer_late(_: object) -> list[bytes]:
        time.sleep(0.01)
        return [b"one", b"two"]

    made = make_app(worker := Worker(answer_late))
    late = ask_once(made, "POST", "/invocations", b"x", {**TARGET, "X-Request-Timeout-Ms": "1"})
    assert (late.status, json.loads(late.body)["OriginalStatusCode"]) == (424, 504)
    assert worker.cancelled == 1
    in_time = ask_once(made, "POST", "/invocations", b"x", {**TARGET, "X-Request-Timeout-Ms": "9000"})
    assert (in_time.status, in_time.body) == (200, b"onetwo")


def test_nothing_stays_held() -> None:
    """However a body comes and a request ends: in parts, too large in all, more than the front may hold."""
    made = make_app(Worker(lambda _: b"1"))

    async def scenario(*parts: bytes) -> int:
        incoming = [{"type": "http.request", "body": part, "more_body": True} for part in parts]
        incoming[-1]["more_body"] = False
        sent = []

        async def receive() -> object:
            return incoming.pop(0)

        async def send(message: dict[str, object]) -> None:
            sent.append(message)

        headers = [(b"x-amzn-sagemaker-target-model", b"m.mar")]
        scope = {"type": "http", "method": "POST", "path": "/invocations", "query_string": b"", "headers": headers}
        await made(scope, receive, send)  # type: ignore[arg-type]
        return int(str(sent[0]["status"]))

    assert asyncio.run(scenario(b"a", b"b")) == 200
    assert asyncio.run(scenario(bytes(600), bytes(600))) == 413
    made.plane.held.size = 4900
    assert asyncio.run(scenario(bytes(100), bytes(100))) == 503
    assert made.plane.held.size == 4900


def test_a_request_has_arrived_when_all_of_its_body_is_here() -> None:
    """The worker is told the time on the monotonic clock; a slow client's upload is no queue of ours."""

    async def scenario() -> None:
        worker = Worker(lambda asked: asked.body)
        made, began, sent = make_app(worker), time.monotonic(), 0.0
        parts = [(b"one", True), (b"two", False)]
        scope = {
            "type": "http",
            "method": "POST",
            "path": "/invocations",
            "query_string": b"",
            "headers": [(name.lower().encode(), value.encode()) for name, value in TARGET.items()],
        }

        async def receive() -> dict[str, object]:
            nonlocal sent
            body, more = parts.pop(0)
            await asyncio.sleep(0.001)
            sent = time.monotonic()
            return {"type": "http.request", "body": body, "more_body": more}

        async def send(message: object) -> None:
            del message

        await made(scope, receive, send)
        (asked,) = worker.asked
        assert asked.body == b"onetwo"
        assert began < sent <= asked.arrived <= time.monotonic()

    asyncio.run(scenario())


def test_a_path_of_no_protocol_is_told_all_of_them() -> None:
    """Each protocol's path comes from the table of routes, with its title, so that none can be forgotten."""
    message = json.loads(ask_once(make_app(), "GET", "/nowhere").body)["message"]
    assert "/v2/models/MODEL/infer (Open Inference Protocol (V2))" in message
    assert [each.routes.title for each in make_app()._dialects if f"({each.routes.title})" not in message] == []

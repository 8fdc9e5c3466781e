"""The client against listeners with prepared answers: new archives, retries, connections and errors."""

import asyncio
import socket
from collections.abc import Iterator
from datetime import datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer, ThreadingHTTPServer

import pytest

from model_store.names import ModelName
from server.sdk.async_client import AsyncClient
from server.sdk.client import Client, reload_model
from server.sdk.errors import (
    DeadlineExceeded,
    FleetcastError,
    InvalidRequest,
    ModelFailed,
    ModelNotFound,
    ServerFailed,
    Unavailable,
    Unreachable,
    error_from_reply,
)
from server.sdk.forecasts import ForecastRequest, ForecastResult
from tests.http_servers import serve_on_thread


class ManagementHandler(BaseHTTPRequestHandler):
    """Holds `au/held.mar` and `au/bad.mar`, and cannot load the second."""

    asked: list[str]

    def do_GET(self) -> None:
        """Describe."""
        self._answer(404 if "away" in self.path else 200, b'{"model": "m"}')

    def do_POST(self) -> None:
        """Reload."""
        if "bad" in self.path:
            self._answer(422, b'{"error": {"code": "archive_invalid", "message": "it is rubbish"}}')
        else:
            self._answer(200, b"{}")

    def _answer(self, status: int, body: bytes) -> None:
        self.asked.append(f"{self.command} {self.path}")
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 -- the base class's name
        """Silent."""


@pytest.fixture
def listener() -> Iterator[str]:
    """The address of one."""
    ManagementHandler.asked = []
    with serve_on_thread(HTTPServer(("127.0.0.1", 0), ManagementHandler)) as place:
        yield f"http://{place}"


def test_only_what_a_server_holds_is_reloaded(listener: str) -> None:
    """A model that it does not have is not loaded for this; one that it has is, slashes and blanks in its name kept."""
    reload_model(listener, ModelName("au/away.mar"))
    reload_model(listener, ModelName("au/held it.mar"))
    get, post = "GET /fleet/models/au/", "POST /fleet/reload/au/"
    assert ManagementHandler.asked == [f"{get}away.mar", f"{get}held%20it.mar", f"{post}held%20it.mar"]


def test_why_a_server_has_not_taken_it_is_said(listener: str) -> None:
    """Its own words, a port where nobody listens, and a URL that is none."""
    with pytest.raises(ModelFailed, match=r"did not take au/bad\.mar: it is rubbish"):
        reload_model(listener, ModelName("au/bad.mar"))
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        with pytest.raises(Unreachable, match="is `fleetcast serve` running there"):
            reload_model(f"http://127.0.0.1:{closed.getsockname()[1]}", ModelName("m"))
    with pytest.raises(ValueError, match="give one such as http"):
        reload_model("localhost:8081", ModelName("m"))


class Inference(BaseHTTPRequestHandler):
    """Answers as it is told, one reply a request: (status, headers, body). Counts its connections."""

    protocol_version = "HTTP/1.1"
    replies: list[tuple[int, dict[str, str], bytes]]
    connections: int
    asked: list[bytes]

    def setup(self) -> None:
        """A new connection."""
        type(self).connections += 1
        super().setup()

    def do_POST(self) -> None:
        """The next reply."""
        self.asked.append(self.rfile.read(int(self.headers["Content-Length"])))
        status, headers, body = self.replies.pop(0)
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 -- the base class's name
        """Silent."""


@pytest.fixture
def inference() -> Iterator[str]:
    """The address of one."""
    Inference.connections, Inference.asked = 0, []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Inference)
    server.daemon_threads = True
    with serve_on_thread(server) as place:
        yield f"http://{place}"


BUSY = (503, {"X-Amz-Retry-After": "1", "Retry-After": "3600"}, b'{"message": "the queue is full"}')
ANSWER = b'{"predictions": [{"start": "2026-01-02 00:00:00", "mean": [1.0]}], "failed": 0}'
LATE = b'{"predictions": [{"error": {"code": "worker_lost", "message": "gone"}}], "failed": 1}'


def test_the_servers_advice_is_followed(inference: str) -> None:
    """A busy server is asked again after its milliseconds, not its hour, over the same connection, `retries` times."""
    Inference.replies = [BUSY, BUSY, (200, {}, ANSWER), (200, {}, ANSWER)]
    with Client(inference, retries=2) as client:
        for _ in range(2):
            assert client.forecast("m.mar", target=[1.0], start=datetime(2026, 1, 1)).mean == [1.0]  # noqa: DTZ001
        Inference.replies = [BUSY] * 3
        with pytest.raises(Unavailable, match="the queue is full") as refused:
            client.invoke("m.mar", b"{}")
    assert (refused.value.status, Inference.connections, len(Inference.asked)) == (503, 1, 7)
    assert b'"start":"2026-01-01 00:00:00"' in Inference.asked[0]


def test_only_the_items_that_may_succeed_are_asked_again(inference: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An item whose worker died is asked once more, one whose model is missing is not."""
    monkeypatch.setattr("server.sdk.client.ITEM_RETRY_S", 0.0)
    missing = b'{"error": {"code": "not_found", "message": "no such archive"}}'
    both = LATE.replace(b"}}], ", b"}}, " + missing + b"], ")
    Inference.replies = [(200, {}, both), (200, {}, ANSWER)]
    requests = [ForecastRequest(model=name, target=[1.0], start="2026-01-01") for name in ("a.mar", "b.mar")]
    with Client(inference) as client:
        good, bad = client.forecast_many(requests)
    assert (getattr(good, "mean", None), type(bad)) == ([1.0], ModelNotFound)
    assert [asked.count(b"target_model") for asked in Inference.asked] == [2, 1]


def test_an_answer_that_is_none(inference: str) -> None:
    """A server that is not Fleetcast, and one whose text is not JSON: errors of the SDK, with what was said."""
    Inference.replies = [(200, {}, b"<html>"), (502, {}, b"bad gateway")]
    with Client(inference, retries=0) as client:
        with pytest.raises(Unreachable, match="not one of forecasts"):
            client.forecast("m.mar", target=[1.0], start="2026-01-01")
        with pytest.raises(ServerFailed, match="bad gateway"):
            client.invoke("m.mar", b"{}")


@pytest.mark.parametrize(
    ("status", "reply", "kind"),
    [
        (424, {"message": "late", "OriginalStatusCode": 504}, DeadlineExceeded),
        (424, {"message": "broken", "OriginalStatusCode": 500}, ModelFailed),
        (400, {"message": "bad", "error": {"code": "not_found", "message": "no such"}}, ModelNotFound),
        (413, {"message": "too large"}, InvalidRequest),
        (500, {"message": "a fault"}, ServerFailed),
    ],
)
def test_errors_have_the_class_of_what_to_do(status: int, reply: dict[str, object], kind: type[FleetcastError]) -> None:
    """The situation's name decides, else the original status, else the status."""
    error = error_from_reply(status, "ModelError", reply)
    assert (type(error), error.error_type) == (kind, "ModelError")


def test_an_asynchronous_client_gives_the_same(inference: str) -> None:
    """Answers, advice of the server and exceptions are those of `Client`; more calls than connections wait."""
    Inference.replies = [
        BUSY,
        *[(200, {}, ANSWER)] * 5,
        (400, {}, b'{"message": "no", "error": {"code": "bad_request"}}'),
    ]

    async def ask() -> tuple[list[ForecastResult], list[ForecastResult | FleetcastError]]:
        async with AsyncClient(inference, connections=2) as client:
            calls = [client.forecast("m.mar", target=[1.0], start="2026-01-01") for _ in range(4)]
            found = await asyncio.gather(*calls)
            many = await client.forecast_many([ForecastRequest(model="m.mar", target=[1.0], start="2026-01-01")])
            with pytest.raises(InvalidRequest):
                await client.invoke("m.mar", b"{}")
            return found, many

    found, many = asyncio.run(ask())
    assert [each.mean for each in found] == [[1.0]] * 4
    assert many == found[:1]
    assert len(Inference.asked) == 7
    assert Inference.connections <= 2


def test_answers_say_their_times_and_errors_their_place(inference: str) -> None:
    """The step of a request is that of its answer; an item's error counts its place in the call."""
    both = ANSWER.replace(b"}], ", b'}, {"error": {"code": "bad_request", "message": "no", "field": "cat"}}], ')
    Inference.replies = [(200, {}, both)]
    step = timedelta(hours=1)
    requests = [ForecastRequest(model="m.mar", target=[1.0], start="2026-01-01", step=step)] * 2
    with Client(inference) as client:
        good, bad = client.forecast_many(requests)
    assert isinstance(good, ForecastResult)
    assert good.to_columns() == {"time": [datetime(2026, 1, 2)], "mean": [1.0]}  # noqa: DTZ001
    assert isinstance(bad, InvalidRequest)
    assert (bad.instance, bad.field) == (1, "cat")
    assert b"step" not in Inference.asked[0]

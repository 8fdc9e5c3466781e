"""Paths, statuses and error bodies of the Open Inference Protocol (CONTRACTS 4)."""

import asyncio
import gzip
import json
import time
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, NoReturn

import pytest

from handlers.codecs import open_inference as codec
from handlers.codecs import open_inference_requests
from server import contract
from server.access.tokens import Scope, Token
from server.errors import Refused, Situation
from server.front.app import App
from server.front.auth.permissions import PermittedPlane
from server.front.dataplane import DataPlane
from server.front.dialects.open_inference import STATUS, ModelOperation, OpenInference
from server.front.dialects.open_inference_models import (
    MOST_LISTED,
    MOST_ROWS,
    VERSION,
    make_config,
    make_index,
    make_statistics,
)
from server.front.exchange import HttpReply, HttpRequest
from server.front.inference import InferRequest
from server.ipc.operations import KnownModel, ListKnownModels, LoadForClient, ModelUsage, UnloadForClient
from server.metrics import FrontMetrics
from server.settings import Settings
from tests.server.front.answering import Answered, Worker, ask, attach, stay_connected

DIALECT = OpenInference(Settings.model_validate({"store": "models"}))
PLAIN = HttpRequest("POST", "/v2/models/a/infer", {}, stay_connected)


def test_every_situation_has_a_status() -> None:
    """Nothing but success is missing from the table."""
    assert STATUS.keys() == set(Situation) - {Situation.OK}


def test_front_and_worker_mean_the_same() -> None:
    """The front imports no codec, so what both know is written twice."""
    assert contract.OPEN_INFERENCE_INFER == codec.INFER
    assert contract.OPEN_INFERENCE_DESCRIBE == codec.DESCRIBE
    assert VERSION == codec.MODEL_VERSION
    assert MOST_ROWS == open_inference_requests.MOST_ROWS


@pytest.mark.parametrize(
    ("path", "model", "version", "verb"),
    [
        ("/v2/models/a", "a", "1", "metadata"),
        ("/v2/models/au/nsw1/energy.mar/infer", "au/nsw1/energy.mar", "1", "infer"),
        ("/v2/models/a/versions/2/ready", "a", "2", "ready"),
        ("/v2/models/a/versions/2", "a", "2", "metadata"),
        ("/v2/models/a/versions/b/c/infer", "a/versions/b/c", "1", "infer"),
        ("/v2/models/infer", "infer", "1", "metadata"),
        ("/v2/models/versions/1/infer", "versions/1", "1", "infer"),
        ("/v2/models/au/a.mar/config", "au/a.mar", "1", "config"),
        ("/v2/models/a/versions/1/stats", "a", "1", "stats"),
        ("/v2/repository/models/au/a.mar/load", "au/a.mar", "1", "load"),
        ("/v2/repository/models/load/unload", "load", "1", "unload"),
    ],
)
def test_paths_of_models(path: str, model: str, version: str, verb: str) -> None:
    """Names may have slashes; the last part of the path is the verb, the part before it may be a version."""
    operation = DIALECT.match("POST" if verb in ("infer", "load", "unload") else "GET", path)
    assert isinstance(operation, ModelOperation)
    assert (operation.model, operation.version, operation.name) == (model, version, verb)
    assert operation.body_limit is not None, "a model is behind it, so that who asks is checked"
    with pytest.raises(Refused, match="is asked by") as caught:
        DIALECT.match("DELETE", path)
    assert caught.value.situation is Situation.BAD_METHOD


@pytest.mark.parametrize(
    "path",
    [
        "/v2/", "/v2/models", "/v2/models/", "/v2/health", "/v2/repository", "/v2/repository/x/index",
        "/v2/repository/models/a", "/v2/repository/models/a/pin", "/v2/repository/models/load",
    ],
)  # fmt: skip
def test_paths_that_are_not_there(path: str) -> None:
    """They say which there are."""
    with pytest.raises(Refused, match="no such path") as caught:
        DIALECT.match("GET", path)
    assert caught.value.situation is Situation.NO_ROUTE


def test_other_paths_are_other_dialects() -> None:
    """Only what is below `/v2`."""
    assert DIALECT.match("GET", "/v2x") is None
    assert DIALECT.match("POST", "/invocations") is None
    assert DIALECT.match("GET", "/v2/health/live") is not None


def test_an_error_is_one_sentence_with_its_place() -> None:
    """Clients of the protocol show `error` and nothing else."""
    reply = DIALECT.refused(Refused(Situation.BAD_REQUEST, "no number", field="inputs[0].data[3]"), PLAIN)
    assert (reply.status, json.loads(reply.body)) == (400, {"error": "inputs[0].data[3]: no number"})
    late = DIALECT.refused(Refused(Situation.OVERLOADED, "busy", retry_ms=1200), PLAIN)
    assert (late.status, dict(late.headers)) == (503, {b"retry-after": b"2"})


class Recorder(DataPlane):
    """A data plane that keeps what it is asked, and refuses it."""

    def __init__(self) -> None:
        super().__init__(1 << 20)
        self.asked: list[InferRequest] = []

    async def infer(self, request: InferRequest) -> NoReturn:
        """Keep the request."""
        self.asked.append(request)
        raise Refused(Situation.OVERLOADED, "busy")


def forward(body: bytes, headers: Mapping[bytes, bytes]) -> InferRequest:
    """What the data plane is asked for a request that arrived at 100 s and may take 50."""

    async def run() -> InferRequest:
        plane = Recorder()
        request = HttpRequest("POST", "/v2/models/a/infer", headers, stay_connected, body=body)
        request.arrived, request.deadline = 100.0, 150.0
        operation = DIALECT.match(request.method, request.path)
        assert operation is not None
        with suppress(Refused):
            await DIALECT.answer(operation, request, plane)
        return plane.asked[0]

    return asyncio.run(run())


@pytest.mark.parametrize(
    ("document", "deadline"),
    [
        ('{"parameters": {"timeout": 2000000}}', 102.0),
        ('{"inputs": [{"data": [1, 2]}], "parameters": {"timeout": 500, "priority": 1}}', 100.0005),
        ('{"parameters": {"timeout": 0}}', 150.0),
        ('{"parameters": {"timeout": 60000000}}', 150.0),
        ('{"inputs": [{"name": "timeout"}]}', 150.0),
        ('{"parameters": {"timeout": -1}}', 150.0),
        ('{"parameters": {"timeout": 1%s}}' % ("0" * 400), 150.0),
        ('{"parameters": {"timeout"', 150.0),
        ("{}", 150.0),
    ],
)
def test_a_timeout_is_the_deadline(document: str, deadline: float) -> None:
    """In microseconds, never later than the server's own; what is wrong with it is for the worker to say."""
    assert forward(document.encode(), {}).deadline == deadline


def test_a_timeout_among_the_binary_data_is_data() -> None:
    """Only the document is looked at."""
    body = b'{}{"parameters": {"timeout": 1}}'
    assert forward(body, {b"inference-header-content-length": b"2"}).deadline == 150.0


@pytest.mark.parametrize("name", [b"target-model", b"x-amzn-sagemaker-target-model"])
def test_a_header_may_name_another_model(name: bytes) -> None:
    """It is the one that answers, and that the answer names."""
    asked = forward(b"{}", {name: b"au/b.mar"})
    assert (asked.model, asked.accept) == ("au/b.mar", "au/b.mar")


@pytest.mark.parametrize(("accepted", "unpack"), [("gzip", gzip.decompress), ("deflate", zlib.decompress)])
def test_answers_are_compressed_where_the_client_asks(accepted: str, unpack: Callable[[bytes], bytes]) -> None:
    """An answer in one part and one in several; without the header it goes as it is."""
    for answer in (b"0.25," * 10, [b"0.25," * 10, b"0.5," * 10]):
        plain = infer(answer, {})
        packed = infer(answer, {"Accept-Encoding": accepted})
        assert "content-encoding" not in plain.headers
        assert packed.headers["content-encoding"] == accepted
        assert packed.headers["content-length"] == str(len(packed.body))
        assert unpack(packed.body) == plain.body


@pytest.mark.parametrize(
    ("path", "body", "headers"),
    [
        ("/invocations", b"{}", {"X-Amzn-SageMaker-Target-Model": "nsw1"}),
        ("/v1/forecasts", b'{"requests":[{"target_model":"nsw1"}]}', {}),
        ("/v2/models/nsw1", b"", {}),
    ],
)
def test_near_names_are_said_in_every_protocol_of_forecasts(path: str, body: bytes, headers: dict[str, str]) -> None:
    """In the message, since clients show nothing else."""

    async def run() -> Answered:
        app = App(Settings.model_validate({"store": "models"}), FrontMetrics())
        missing = (Situation.NOT_FOUND, b'{"message":"no such archive"}')
        attach(app.plane, Worker(lambda asked: missing if asked.model == "nsw1" else b"{}"))
        await ask(app, "POST", "/v2/models/NSW1.mar/infer", b"{}")
        return await ask(app, "POST" if body else "GET", path, body, headers)

    assert b"no such archive; names that are like it: NSW1.mar" in asyncio.run(run()).body


def test_an_answer_that_there_is_no_room_to_compress_is_given_up() -> None:
    """It is refused, and its worker waits for nobody to read it."""

    async def run() -> tuple[Answered, Worker]:
        app = App(Settings.model_validate({"store": "models", "max_inflight_bytes": 1 << 20}), FrontMetrics())
        worker = Worker(lambda _: [b"0.25," * 10, bytes(2 << 20)])
        attach(app.plane, worker)
        return await ask(app, "POST", "/v2/models/a/infer", b"{}", {"Accept-Encoding": "gzip"}), worker

    answered, worker = asyncio.run(run())
    assert (answered.status, worker.cancelled) == (503, 1)


def infer(answer: Any, headers: Mapping[str, str]) -> Answered:
    """What the app makes of a worker's answer."""

    async def run() -> Answered:
        app = App(Settings.model_validate({"store": "models"}), FrontMetrics())
        attach(app.plane, Worker(lambda _: answer))
        found = await ask(app, "POST", "/v2/models/a/infer", b"{}", headers)
        assert app.plane.held.size == 0
        return found

    return asyncio.run(run())


KNOWN = [
    KnownModel("a", "ready", usage=ModelUsage(3, 1, 2, 900, 50, 100, 600, 1700000000000)),
    KnownModel("b", "loading"),
    KnownModel("c", "unavailable", "no such member"),
]


def test_statistics_are_what_workers_counted() -> None:
    """Counts as they are, times in nanoseconds; what is not known is 0."""
    (found,) = make_statistics(KNOWN[:1])["model_stats"]
    assert (found["name"], found["version"], found["last_inference"]) == ("a", "1", 1700000000000)
    assert (found["inference_count"], found["execution_count"]) == (3, 2)
    stats = found["inference_stats"]
    assert stats["success"] == {"count": 3, "ns": 900000}
    assert stats["fail"] == {"count": 1, "ns": 50000}
    assert (stats["queue"]["ns"], stats["compute_infer"]["ns"]) == (100000, 600000)
    assert stats["cache_hit"] == {"count": 0, "ns": 0}


def test_an_index_says_states_and_reasons() -> None:
    """All that the workers know, or those alone that are ready."""
    assert make_index(KNOWN, only_ready=False) == [
        {"name": "a", "version": "1", "state": "READY"},
        {"name": "b", "version": "1", "state": "LOADING"},
        {"name": "c", "version": "1", "state": "UNAVAILABLE", "reason": "no such member"},
    ]
    assert [each["name"] for each in make_index(KNOWN, only_ready=True)] == ["a"]


def test_a_configuration_has_the_models_tensors() -> None:
    """Without the axis of rows, and with the names that a configuration has for datatypes."""
    tensor = {"name": "x", "datatype": "BYTES", "shape": [-1, 2, -1]}
    found = make_config("a", [tensor], [{**tensor, "datatype": "UINT8"}])
    assert found["input"][0]["dims"] == [2, -1]
    assert (found["input"][0]["data_type"], found["output"][0]["data_type"]) == ("TYPE_STRING", "TYPE_UINT8")


class Repository(DataPlane):
    """A data plane whose supervisor knows `KNOWN`, and keeps what it is told."""

    def __init__(self) -> None:
        super().__init__(1 << 20)
        self.told: list[tuple[Any, float]] = []

    async def _ask_supervisor(self, asked: Any, deadline: float) -> Any:
        self.told.append((asked, deadline))
        return KNOWN if isinstance(asked, ListKnownModels) else ""


def manage(plane: Any, path: str, body: bytes = b"", headers: Mapping[bytes, bytes] | None = None) -> HttpReply:
    """The dialect's reply to a POST. Raises Refused."""
    operation = DIALECT.match("POST", path)
    assert operation is not None
    request = HttpRequest("POST", path, headers or {}, stay_connected, body=body, deadline=9.0)
    return asyncio.run(DIALECT.answer(operation, request, plane))


LOAD = "/v2/repository/models/au/a.mar/load"
UNLOAD = "/v2/repository/models/au/a.mar/unload"


def test_loading_needs_the_operators_consent() -> None:
    """Off by default, and the error says what allows it; then the supervisor is told, within the deadline."""
    plane = Repository()
    with pytest.raises(Refused, match="repository_control, or by a token with the scopes invoke and manage") as caught:
        manage(plane, LOAD)
    assert caught.value.situation is Situation.FORBIDDEN
    assert plane.told == []
    plane.clients_control = True
    assert manage(plane, LOAD, b"{}").status == 200
    assert manage(plane, UNLOAD, b'{"parameters":{"unload_dependents":true}}').status == 200
    assert plane.told == [(LoadForClient("au/a.mar"), 9.0), (UnloadForClient("au/a.mar"), 9.0)]


@pytest.mark.parametrize("header", [b"origin", b"sec-fetch-site"])
def test_a_page_cannot_have_its_visitor_load_models(header: bytes) -> None:
    """Browsers say that they are some, so they are refused where loading is allowed to all."""
    plane = Repository()
    plane.clients_control = True
    with pytest.raises(Refused, match="a browser may not"):
        manage(plane, LOAD, headers={header: b"null"})
    assert plane.told == []


BOTH = (Scope.INVOKE, Scope.MANAGE)


@pytest.mark.parametrize(
    ("scopes", "models", "allowed"),
    [((Scope.INVOKE,), (), False), (BOTH, (), True), (BOTH, ("au/",), True), (BOTH, ("eu/",), False)],
)
def test_a_token_with_manage_may_load_its_models(
    scopes: tuple[Scope, ...], models: tuple[str, ...], allowed: bool
) -> None:
    """Whatever the setting says: a token without the scope may not where all others may."""
    plane = Repository()
    plane.clients_control = not allowed
    permitted = PermittedPlane(plane, Token("t", "0" * 64, scopes, models))
    if allowed:
        manage(permitted, LOAD)
        assert len(plane.told) == 1
        return
    with pytest.raises(Refused, match="the token t allows") as caught:
        manage(permitted, LOAD)
    assert caught.value.situation is Situation.FORBIDDEN
    assert plane.told == []


def test_a_token_of_some_models_sees_those() -> None:
    """An index asks for the token's prefixes alone."""
    plane = Repository()
    token = Token("t", "0" * 64, (Scope.INVOKE,), ("au/", "eu/"))
    manage(PermittedPlane(plane, token), "/v2/repository/index")
    assert [asked.prefix for asked, _ in plane.told] == ["au/", "eu/"]


def test_an_index_and_all_statistics_are_bounded() -> None:
    """So many models are asked for, and no more are answered where several prefixes have as many."""
    plane = Repository()
    manage(plane, "/v2/repository/index")
    operation = DIALECT.match("GET", "/v2/models/stats")
    assert operation is not None
    asyncio.run(DIALECT.answer(operation, HttpRequest("GET", "/v2/models/stats", {}, stay_connected), plane))
    assert [asked.limit for asked, _ in plane.told] == [MOST_LISTED, MOST_LISTED]
    token = Token("t", "0" * 64, (Scope.INVOKE,), ("au/", "eu/"))
    known = asyncio.run(PermittedPlane(plane, token).list_known(ListKnownModels("", "", 2), 9.0))
    assert [each.model for each in known] == ["a", "b"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v2/repository/index", b'{"ready": "x"}'),
        ("/v2/repository/index", b"{"),
        (LOAD, b"{"),
        (LOAD, b'{"parameters": {"config": "{}"}}'),
        (LOAD, b'{"parameters": {"unload_dependents": true}}'),
    ],
)
def test_wrong_bodies_are_refused(path: str, body: bytes) -> None:
    """Before the supervisor is asked."""
    plane = Repository()
    plane.clients_control = True
    with pytest.raises(Refused) as caught:
        manage(plane, path, body)
    assert caught.value.situation is Situation.BAD_REQUEST
    assert plane.told == []


def test_an_unknown_model_is_answered_with_near_names() -> None:
    """Of models that answered here, and that the client's token allows; a look only now and then."""

    async def run(token: Token | None) -> list[str]:
        app = App(Settings.model_validate({"store": "models"}), FrontMetrics())
        missing = (Situation.NOT_FOUND, b'{"message":"no such archive"}')
        attach(app.plane, Worker(lambda asked: missing if "nws" in asked.model else b"{}"))
        for name in ("au/NSW1.mar", "eu/NSW1.mar", "au/VIC1.mar"):
            await ask(app, "POST", f"/v2/models/{name}/infer", b"{}")
        plane = app.plane if token is None else PermittedPlane(app.plane, token)
        operation, said = DIALECT.match("GET", "/v2/models/au/nws1"), list[str]()
        assert operation is not None
        for _ in range(2):
            request = HttpRequest("GET", "/v2/models/au/nws1", {}, stay_connected, deadline=time.monotonic() + 60)
            with pytest.raises(Refused) as caught:
                await DIALECT.answer(operation, request, plane)
            said.append(caught.value.detail.message)
        return said

    first, second = asyncio.run(run(None))
    assert first == "no such archive; names that are like it: au/NSW1.mar"
    assert second in (first, "no such archive"), "another look comes only after a while"
    token = Token("t", "0" * 64, (Scope.INVOKE,), ("au/n",))
    assert asyncio.run(run(token))[0] == "no such archive"

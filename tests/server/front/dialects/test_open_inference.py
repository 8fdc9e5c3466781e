"""Paths, statuses and error bodies of the Open Inference Protocol (CONTRACTS 4)."""

import asyncio
import gzip
import json
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, NoReturn

import pytest

from handlers.codecs import open_inference as codec
from server import contract
from server.errors import Refused, Situation
from server.front.app import App
from server.front.dataplane import DataPlane, InferRequest
from server.front.dialects.open_inference import STATUS, VERSION, ModelOperation, OpenInference
from server.front.exchange import HttpRequest
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
    ],
)
def test_paths_of_models(path: str, model: str, version: str, verb: str) -> None:
    """Names may have slashes; the last part of the path is the verb, the part before it may be a version."""
    operation = DIALECT.match("POST" if verb == "infer" else "GET", path)
    assert isinstance(operation, ModelOperation)
    assert (operation.model, operation.version, operation.name) == (model, version, verb)
    assert operation.body_limit is not None, "a model is behind it, so that who asks is checked"
    with pytest.raises(Refused, match="is asked by") as caught:
        DIALECT.match("DELETE", path)
    assert caught.value.situation is Situation.BAD_METHOD


@pytest.mark.parametrize("path", ["/v2/", "/v2/models", "/v2/models/", "/v2/health", "/v2/repository/index"])
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


def infer(answer: Any, headers: Mapping[str, str]) -> Answered:
    """What the app makes of a worker's answer."""

    async def run() -> Answered:
        app = App(Settings.model_validate({"store": "models"}), FrontMetrics())
        attach(app.plane, Worker(lambda _: answer))
        found = await ask(app, "POST", "/v2/models/a/infer", b"{}", headers)
        assert app.plane.held.size == 0
        return found

    return asyncio.run(run())

"""Paths, statuses and error bodies of the Open Inference Protocol (CONTRACTS 4)."""

import json

import pytest

from handlers.codecs import open_inference as codec
from server import contract
from server.errors import Refused, Situation
from server.front.dialects.open_inference import STATUS, VERSION, ModelOperation, OpenInference
from server.front.exchange import HttpRequest
from server.settings import Settings
from tests.server.front.answering import stay_connected

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

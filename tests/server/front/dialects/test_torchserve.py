"""TorchServe's inference protocol: which archive a path means, statuses and bodies of errors, time-outs, counts."""

import asyncio
import json
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from model_store.name_table import ENTRY_BYTES
from server.code_messages import decode_fields
from server.contract import OPEN_INFERENCE_DESCRIBE
from server.errors import Detail, Refused, Situation
from server.front import archive_requests
from server.front.app import App
from server.front.archive_requests import KEY_BYTES, MAX_PARAMETERS
from server.front.dialects.torchserve import ERRORS, ModelOperation, TorchServe
from server.front.registrations import MOST_COUNTED, Registrations
from server.front.torchserve_metrics import RegisteredFamilies
from server.ipc.handler_calls import decode_call
from server.ipc.operations import RegisteredModel, ServedVersion
from server.metrics import FrontMetrics
from server.settings import Settings
from tests.server.front.answering import JSON, Answered, Asked, Worker, ask, attach

SETTINGS = Settings.model_validate({"store": "models", "allow_code": ["*"]})
DIALECT = TorchServe(SETTINGS)
NOT_THERE = json.dumps({"message": "no such archive"}).encode()


def register(name: str, *, workers: int = 1, timeout_s: float = 50.0, **keys: str) -> dict[str, RegisteredModel]:
    """A registered name, whose versions are those of `keys` without their first letter; the first is the default."""
    versions = {version[1:]: ServedVersion(key, workers, timeout_s) for version, key in keys.items()}
    return {name: RegisteredModel(next(iter(versions)), versions)}


def make_app(answer: Callable[[Asked], Any], **registered: RegisteredModel) -> tuple[App, Worker]:
    """An app over a worker, with these names registered (`__` stands for a slash)."""
    app, worker = App(SETTINGS, FrontMetrics()), Worker(answer)
    attach(app.plane, worker)
    app.plane.registrations.follow({name.replace("__", "/"): each for name, each in registered.items()}, whole=True)
    return app, worker


def has(*keys: str) -> Callable[[Asked], Any]:
    """A worker whose store has these archives."""
    return lambda asked: b"yes" if asked.model in keys else (Situation.NOT_FOUND, NOT_THERE)


def send(app: App, path: str, method: str = "POST", body: bytes = b"{}") -> Answered:
    """One request."""
    return asyncio.run(ask(app, method, path, body, {"Content-Type": JSON}))


def error_of(answered: Answered) -> Mapping[str, Any]:
    """The body of an error, whose `code` is the status."""
    body: dict[str, Any] = json.loads(answered.body)
    assert body["code"] == answered.status
    return body


def test_every_situation_has_a_code() -> None:
    """Nothing but success is missing from the table."""
    assert ERRORS.keys() == set(Situation) - {Situation.OK}


@pytest.mark.parametrize(
    ("path", "verb", "rest"),
    [
        ("/predictions/au/NSW1/2", "predict", "au/NSW1/2"),
        ("/explanations/a", "explain", "a"),
        ("/models/au/NSW1.mar/invoke", "invoke", "au/NSW1.mar"),
        ("/v1/models/au/NSW1:predict", "predict", "au/NSW1"),
        ("/v1/models/a:explain", "explain", "a"),
        ("/au/NSW1/predict", "invoke", "au/NSW1"),
    ],
)
def test_paths_of_models(path: str, verb: str, rest: str) -> None:
    """Any method asks for an answer, as with TorchServe."""
    for method in ("GET", "POST", "PUT"):
        operation = DIALECT.match(method, path)
        assert isinstance(operation, ModelOperation)
        assert (operation.name, operation.path) == (verb, rest)
        assert operation.body_limit is not None, "a model is behind it, so that who asks is checked"


@pytest.mark.parametrize(
    "path", ["/predictions", "/predictions/", "/models", "/models/a", "/models/a/b", "/v1/models/a"]
)
def test_paths_that_are_not_there(path: str) -> None:
    """What TorchServe has on its management listener only is not found here."""
    with pytest.raises(Refused) as caught:
        DIALECT.match("POST", path)
    assert caught.value.situation is Situation.NO_ROUTE


def test_invocations_are_sagemakers_unless_the_query_names_a_model() -> None:
    """And others' paths are left to them."""
    app, worker = make_app(has("nsw1.mar"))
    assert DIALECT.match("POST", "/invocations") is None
    assert DIALECT.match("POST", "/v1/forecasts") is None
    assert send(app, "/invocations?model_name=nsw1.mar").body == b"yes"
    assert "message" in json.loads(send(app, "/invocations?q=1").body)
    assert [asked.model for asked in worker.asked] == ["nsw1.mar"]


def test_key_answers_with_and_without_its_suffix() -> None:
    """What nobody has registered is looked for in the store; where it was found is remembered while it is there."""
    keys = ["au/nsw1.mar"]
    app, worker = make_app(lambda asked: b"yes" if asked.model in keys else (Situation.NOT_FOUND, NOT_THERE))
    for path in ("/predictions/au/nsw1", "/predictions/au/nsw1", "/predictions/au/nsw1.mar"):
        assert (send(app, path).status, send(app, path).body) == (200, b"yes")
    assert [asked.model for asked in worker.asked].count("au/nsw1") == 1
    keys.clear()
    refused = send(app, "/predictions/au/nsw1")
    assert error_of(refused) == {"code": 404, "type": "ModelNotFoundException", "message": "Model not found: au/nsw1"}
    keys.append("au/nsw1")
    assert send(app, "/predictions/au/nsw1").body == b"yes"


def test_names_are_remembered_in_bounded_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients make up names that an archive's key answers to; the oldest are forgotten."""
    monkeypatch.setattr(archive_requests, "MAX_NAME_BYTES", 4 * (ENTRY_BYTES + KEY_BYTES))
    app, worker = make_app(lambda asked: b"yes" if asked.model.endswith(".mar") else (Situation.NOT_FOUND, NOT_THERE))
    for name in ("a", "b", "c", "d", "a", "d"):
        assert send(app, f"/predictions/{name}").status == 200
    tried = [asked.model for asked in worker.asked]
    assert (tried.count("a"), tried.count("d")) == (2, 1), "of four names the first was forgotten, the last was not"


def test_longest_registered_name_wins_and_a_version_follows() -> None:
    """`au/NSW1/2` is a name before it is version 2 of `au/NSW1`; an archive of the store comes last."""
    one = register("au/NSW1", v1="one.mar", v2="two.mar")["au/NSW1"]
    other = register("au/NSW1/2", v9="nine.mar")["au/NSW1/2"]
    app, worker = make_app(has("one.mar", "two.mar", "nine.mar", "au/NSW1/3.mar"), au__NSW1=one)
    for path in ("au/NSW1", "au/NSW1/2", "au/NSW1/1/a/b", "au/NSW1/3"):
        assert send(app, f"/predictions/{path}").status == 200
    assert [asked.model for asked in worker.asked] == ["one.mar", "two.mar", "one.mar", "au/NSW1/3", "au/NSW1/3.mar"]
    app, worker = make_app(has("nine.mar"), au__NSW1=one, au__NSW1__2=other)
    assert send(app, "/predictions/au/NSW1/2").status == 200
    missing = error_of(send(app, "/predictions/au/NSW1/8"))
    assert missing["type"] == "ModelVersionNotFoundException"
    assert missing["message"] == "Model version: 8 does not exist for model: au/NSW1"


def test_registered_model_without_workers_and_full_queue_are_told_apart() -> None:
    """Both are 503; the message says which."""
    full = json.dumps({"message": "2 requests wait for it already"}).encode()
    app, _ = make_app(
        lambda _: (Situation.OVERLOADED, full),
        a=register("a", workers=0, v1="a.mar")["a"],
        b=register("b", v1="b")["b"],
    )
    none, queued = error_of(send(app, "/predictions/a")), error_of(send(app, "/predictions/b"))
    assert none["type"] == queued["type"] == "ServiceUnavailableException"
    assert "no worker" in none["message"]
    assert "wait for it" in queued["message"]


def test_handler_is_told_of_the_request() -> None:
    """Explanations, what follows the version, and the query where TorchServe makes parameters of it."""
    app, worker = make_app(has("a.mar"), a=register("a", v1="a.mar")["a"])
    send(app, "/explanations/a/1/x/y?q=1")
    send(app, "/models/a/invoke?q=1&r=")
    send(app, "/v1/models/a:predict")
    calls = [decode_call(asked.handler_call) for asked in worker.asked]
    assert [call.properties for call in calls] == [
        {"explain": "True", "url_path": "x/y"},
        {},
        {"explain": "False"},
    ]
    assert [call.parts for call in calls] == [[], [("q", "1"), ("r", "")], []]
    assert decode_fields(calls[0].fields)["content-type"] == JSON
    too_many = "&".join(["q=1"] * (MAX_PARAMETERS + 1))
    assert send(app, f"/models/a/invoke?{too_many}").status == 400


@pytest.mark.parametrize(
    ("situation", "detail", "status", "kind"),
    [
        (Situation.MODEL_FAILED, Detail("Prediction failed", status=503), 503, "InternalServerException"),
        (Situation.MODEL_FAILED, Detail("bad input", status=422), 422, "InternalServerException"),
        (Situation.MODEL_FAILED, Detail("not a number"), 500, "InternalServerException"),
        (Situation.NO_ROOM, Detail("no room"), 507, "InternalServerException"),
        (Situation.BAD_REQUEST, Detail("no JSON"), 400, "BadRequestException"),
    ],
)
def test_failures_are_torchserves(situation: Situation, detail: Detail, status: int, kind: str) -> None:
    """A handler's own code wins; the shape is always the same."""
    body = json.dumps({"message": detail.message, **({"status": detail.status} if detail.status else {})}).encode()
    app, _ = make_app(lambda _: (situation, body))
    refused = send(app, "/predictions/a.mar")
    assert error_of(refused) == {"code": status, "type": kind, "message": detail.message}
    assert refused.headers["cache-control"].startswith("no-cache")


def test_time_out_of_a_registration_is_a_worker_that_died() -> None:
    """As TorchServe says it; the client's own deadline stays a 504."""
    late = json.dumps({"message": "too late"}).encode()
    models = {"a": register("a", timeout_s=1.0, v1="a.mar")["a"], "b": register("b", timeout_s=1e6, v1="b.mar")["b"]}
    app, _ = make_app(lambda _: (Situation.DEADLINE, late), **models)
    short, long = send(app, "/predictions/a"), send(app, "/predictions/b")
    assert (short.status, long.status) == (500, 504)
    assert error_of(short)["message"].startswith("Worker died")


def test_probes_of_kserves_first_protocol() -> None:
    """A sign of life; a model is ready when it answers, by a registered name, by a key, or not."""
    registered = {**register("a", v1="a.mar"), **register("idle", workers=0, v1="a.mar")}
    app, worker = make_app(has("a.mar", "b.mar"), **registered)
    assert json.loads(send(app, "/", "GET").body) == {"status": "alive"}
    assert worker.asked == []
    for name in ("a", "b"):
        assert json.loads(send(app, f"/v1/models/{name}", "GET").body) == {"name": name, "ready": True}
    assert {asked.model for asked in worker.asked} >= {"a.mar", "b.mar"}
    assert {asked.content_type for asked in worker.asked} == {OPEN_INFERENCE_DESCRIBE}
    assert [send(app, f"/v1/models/{name}", "GET").status for name in ("none", "idle")] == [404, 503]


def test_descriptions_need_no_model_but_a_registered_one() -> None:
    """`OPTIONS` describes the protocol, or one model."""
    app, worker = make_app(has(), a=register("a", v1="a.mar")["a"])
    assert json.loads(send(app, "/", "OPTIONS").body)["openapi"] == "3.0.1"
    assert send(app, "/", "POST").status == 405
    assert json.loads(send(app, "/predictions/a", "OPTIONS").body)["info"]["title"].endswith("a")
    assert send(app, "/predictions/b", "OPTIONS").status == 404
    assert worker.asked == []


def test_series_go_with_their_registration() -> None:
    """Refused and answered requests count; what is unregistered has no series, and their number is bounded."""
    app, _ = make_app(has("a.mar"), a=register("a", v1="a.mar", v2="gone.mar")["a"])
    for version in ("1", "1", "2"):
        send(app, f"/predictions/a/{version}")
    registrations = app.plane.registrations
    shown = expose(registrations)
    assert 'ts_inference_requests_total{hostname="h",model_name="a",model_version="1"} 2.0' in shown
    assert 'ts_inference_requests_total{hostname="h",model_name="a",model_version="2"} 1.0' in shown
    assert 'ts_queue_latency_microseconds{hostname="h",model_name="a",model_version="1"}' in shown
    registrations.follow(register("a", v1="a.mar"), whole=False)
    assert 'model_version="2"' not in expose(registrations)
    registrations.follow({"a": None}, whole=False)
    assert "ts_" not in expose(registrations)
    for i in range(MOST_COUNTED + 1):
        registrations.count_for(str(i), "1")
    assert len(registrations.served) == MOST_COUNTED


def expose(registrations: Registrations) -> str:
    """What Prometheus gets."""
    registry = CollectorRegistry()
    registry.register(RegisteredFamilies(registrations, "h"))
    return generate_latest(registry).decode()

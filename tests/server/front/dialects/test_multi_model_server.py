"""Paths, names and error bodies of Multi Model Server's protocol, and who manages models on a container's port."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from server.access.tokens import hash_token
from server.errors import Refused, Situation
from server.front.app import App
from server.front.dataplane import MOST_MANAGED
from server.front.dialects.multi_model_server import MultiModelServer, Prediction
from server.front.exchange import HttpRequest
from server.ipc.operations import ManagementReply, ManageModels, RegisteredModel, ServedVersion
from server.metrics import FrontMetrics
from server.model_server_api.mms_errors import ERRORS
from server.settings import Settings
from tests.server.front.answering import Answered, Worker, ask, attach, stay_connected

TARGET = "X-Amzn-SageMaker-Target-Model"


def make_settings(**settings: object) -> Settings:
    """A listener that speaks the protocol."""
    return Settings.model_validate({"store": "models", "model_server_api": "mms", **settings})


class Supervisor:
    """Answers what fronts ask it, and remembers that."""

    def __init__(self) -> None:
        self.asked: list[ManageModels] = []
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.is_busy = asyncio.Event()  # as many are asked as may be

    async def ask(self, operation: ManageModels, timeout_s: float) -> ManagementReply:
        """A channel's."""
        assert timeout_s > 0
        self.asked.append(operation)
        if len(self.asked) == MOST_MANAGED:
            self.is_busy.set()
        await self.may_answer.wait()
        return ManagementReply(202, b"done")


def make_app(worker: Worker, **settings: object) -> App:
    """A front, told of one registered model with workers and of one without."""
    made = App(make_settings(**settings), FrontMetrics())
    attach(made.plane, worker)
    served = {"a/b": ServedVersion("key.mar", 1, 60.0), "idle": ServedVersion("idle.mar", 0, 60.0)}
    registered: dict[str, RegisteredModel | None] = {
        name: RegisteredModel("1.0", {"1.0": version}) for name, version in served.items()
    }
    made.plane.registrations.follow(registered, whole=True)
    return made


def send(made: App, method: str, path: str, body: bytes = b"{}", **headers: str) -> Answered:
    """One request."""
    return asyncio.run(ask(made, method, path, body, headers))


def test_every_situation_has_a_status() -> None:
    """Nothing but success is missing from the table."""
    assert ERRORS.keys() == set(Situation) - {Situation.OK}


@pytest.mark.parametrize("situation", set(Situation) - {Situation.OK})
def test_an_error_has_code_type_and_message(situation: Situation) -> None:
    """The code is the status; what an archive's code has answered goes before the table."""
    dialect = MultiModelServer(make_settings())
    plain = HttpRequest("POST", "/predictions/a", {}, stay_connected)
    reply = dialect.refused(Refused(situation, "why", field="x", retry_ms=1200), plain)
    body = json.loads(reply.body)
    assert list(body) == ["code", "type", "message"]
    assert body["code"] == reply.status
    assert dict(reply.headers)[b"retry-after"] == b"2"
    own = dialect.refused(Refused(situation, "why", status=418), plain).status
    assert own == (418 if situation is Situation.MODEL_FAILED else reply.status)


@pytest.mark.parametrize(
    ("path", "model"),
    [
        ("/predictions/a/b", "a/b"),
        ("/models/a/b/invoke", "a/b"),
        ("/a/b/predict", "a/b"),
        ("/models/models/invoke/invoke", "models/invoke"),
        ("/invocations", ""),
    ],
)
def test_paths_of_models(path: str, model: str) -> None:
    """Names may have slashes. A DELETE is no request to a model."""
    dialect = MultiModelServer(make_settings())
    operation = dialect.match("POST", path)
    assert isinstance(operation, Prediction)
    assert operation.model == model
    with pytest.raises(Refused) as caught:
        dialect.match("DELETE", path)
    assert caught.value.situation is Situation.BAD_METHOD


@pytest.mark.parametrize(
    ("request_line", "key"),
    [
        ("/predictions/a/b", "key.mar"),
        ("/invocations?model_name=a/b", "key.mar"),
        ("/invocations?x=1&model_name=other.mar", "other.mar"),
        ("/predictions/other.mar", "other.mar"),
    ],
)
def test_a_registered_name_stands_for_its_archive(request_line: str, key: str) -> None:
    """And any other is a key of the store."""
    worker = Worker(lambda _: b"1")
    reply = send(make_app(worker), "POST", request_line)
    assert (reply.status, reply.headers["pragma"]) == (200, "no-cache")
    assert [asked.model for asked in worker.asked] == [key]


@pytest.mark.parametrize(
    ("request_line", "status"),
    [
        ("/predictions/idle", 503),
        ("/invocations?model_name=", 400),
        ("/predictions/../x", 400),
        ("/models/a/b/invoke?" + "&".join(f"a{i}=1" for i in range(300)), 400),
        ("/models/a/b/invoke?" + "a" * 20_000, 400),
        ("/nosuch", 404),
        ("/", 405),
    ],
)
def test_what_cannot_be_asked_reaches_no_worker(request_line: str, status: int) -> None:
    """A model without workers, no name, a wrong one, a query that is too large, a path that is not there."""
    worker = Worker(lambda _: b"1")
    reply = send(make_app(worker), "POST", request_line)
    assert (reply.status, json.loads(reply.body)["code"]) == (status, status)
    assert not worker.asked


@pytest.mark.parametrize("container", ["off", "multi-model"])
def test_a_header_names_the_model_as_well(container: str) -> None:
    """As SageMaker's clients send it: in a container what is registered, elsewhere a key of the store."""
    worker = Worker(lambda _: b"1")
    assert send(make_app(worker, container=container), "POST", "/invocations", b"{}", **{TARGET: "a/b"}).status == 200
    assert [asked.model for asked in worker.asked] == ["a/b" if container == "off" else "key.mar"]


def test_a_container_knows_what_is_registered_and_nothing_else() -> None:
    """No archive of the store is loaded for a request; the target model is for logs alone."""
    worker = Worker(lambda _: b"1")
    made = make_app(worker, container="multi-model")
    assert send(made, "POST", "/models/a/b/invoke", b"{}", **{TARGET: "other.mar"}).status == 200
    assert send(made, "POST", "/models/other.mar/invoke").status == 404
    assert [asked.model for asked in worker.asked] == ["key.mar"]


def test_models_are_managed_on_a_containers_port_alone() -> None:
    """The supervisor answers; its words go to the client as they are."""
    for settings, managed in (
        ({"container": "multi-model"}, True),
        ({"container": "single-model"}, False),
        ({}, False),
    ):
        made, supervisor = make_app(Worker(lambda _: b"1"), **settings), Supervisor()
        made.plane.supervisor = supervisor  # type: ignore[assignment]
        reply = send(made, "POST", "/models?synchronous=true", b'{"url": "x"}')
        expected = [ManageModels("POST", "/models", "synchronous=true", b'{"url": "x"}')] if managed else []
        assert (reply.status, supervisor.asked) == (202 if managed else 404, expected)


def test_tokens_that_may_ask_may_not_manage(tmp_path: Path) -> None:
    """Where the operator has set tokens, the container's port asks for one that manages all models."""
    tokens: dict[str, dict[str, Any]] = {
        "asks": {"scopes": ["invoke"]},
        "some": {"scopes": ["invoke", "manage"], "models": ["a/"]},
        "all": {"scopes": ["invoke", "manage"]},
    }
    lines = [
        f'[[tokens]]\nname = "{name}"\nsha256 = "{hash_token(name.encode())}"\n'
        + "".join(f"{key} = {json.dumps(value)}\n" for key, value in more.items())
        for name, more in tokens.items()
    ]
    (tmp_path / "tokens.toml").write_text("".join(lines))
    made = make_app(Worker(lambda _: b"1"), container="multi-model", tokens=tmp_path / "tokens.toml")
    made.plane.supervisor = supervisor = Supervisor()  # type: ignore[assignment]
    found = {name: send(made, "GET", "/models", b"", Authorization=f"Bearer {name}").status for name in tokens}
    assert found == {"asks": 403, "some": 403, "all": 202}
    assert send(made, "GET", "/models", b"").status == 401
    assert len(supervisor.asked) == 1


def test_management_requests_are_bounded() -> None:
    """The supervisor is asked so many at a time, however many clients come; when one is answered there is room."""

    async def flood() -> list[int]:
        made, supervisor = make_app(Worker(lambda _: b"1"), container="multi-model"), Supervisor()
        made.plane.supervisor = supervisor  # type: ignore[assignment]
        supervisor.may_answer.clear()
        asked = [asyncio.create_task(ask(made, "GET", "/models")) for _ in range(MOST_MANAGED)]
        await supervisor.is_busy.wait()
        refused = await ask(made, "GET", "/models")
        supervisor.may_answer.set()
        answered = await asyncio.gather(*asked)
        return [refused.status, *{each.status for each in answered}, (await ask(made, "GET", "/models")).status]

    assert asyncio.run(flood()) == [503, 202, 202]


def test_a_front_without_its_supervisor_says_so() -> None:
    """For example while the server stops."""
    made = make_app(Worker(lambda _: b"1"), container="multi-model")
    assert send(made, "GET", "/models", b"").status == 503

"""TorchServe's management API over a fleet that notes what it is told: parameters, names, pages and refusals."""

import asyncio
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException

from server.errors import Situation
from server.settings import Settings
from server.supervisor.model_server_api.torchserve import TorchServeApi
from server.supervisor.model_server_api.torchserve_answers import refuse_path
from server.supervisor.registrations.service import RegistrationService
from tests.server.supervisor.registrations.test_service import Fleet


class Client:
    """Asks an API over a fleet of its own."""

    def __init__(self, **settings: object) -> None:
        self.fleet = Fleet()
        made = Settings.model_validate({"store": "s3://models", "code_timeout_s": 5, **settings})
        api = TorchServeApi(RegistrationService("s3://models", self.fleet), made)
        self._app = Starlette(routes=api.list_routes(), exception_handlers={HTTPException: refuse_path})

    def ask(self, method: str, path: str, **arguments: Any) -> tuple[int, Any]:
        """Status and JSON."""
        return asyncio.run(self._ask(method, path, arguments))

    async def _ask(self, method: str, path: str, arguments: dict[str, Any]) -> tuple[int, Any]:
        transport = httpx.ASGITransport(self._app)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            reply = await client.request(method, path, **arguments)
        return reply.status_code, reply.json()


def test_names_with_slashes_and_versions_are_told_apart() -> None:
    """The longest registered name that a path begins with is meant; what follows it is a version."""
    client = Client()
    for name, version in (("au", "1"), ("au", "2"), ("au/NSW1", "3")):
        query = {"url": "probe.mar", "model_name": name, "model_version": version}
        assert client.ask("POST", "/models", params=query)[0] == 200
    described = [client.ask("GET", f"/models/{path}")[1][0] for path in ("au", "au/2", "au/NSW1", "au/NSW1/3")]
    assert [(each["modelName"], each["modelVersion"]) for each in described] == [
        ("au", "1"), ("au", "2"), ("au/NSW1", "3"), ("au/NSW1", "3")
    ]  # fmt: skip
    assert [each["modelVersion"] for each in client.ask("GET", "/models/au/all")[1]] == ["1", "2"]
    assert client.ask("PUT", "/models/au/2/set-default")[0] == 200
    assert client.ask("PUT", "/models/nosuch/x/2/set-default")[1]["message"] == "Model not found: nosuch/x"
    assert client.ask("PUT", "/models/au/9/set-default")[1]["message"] == "Model version 9 does not exist for model au"
    assert client.ask("DELETE", "/models/au/9")[1]["type"] == "ModelVersionNotFoundException"
    assert client.ask("GET", "/v1/models/au")[1] == {"name": "au", "ready": False}


def test_pages_end_with_the_last_name() -> None:
    """A token is given only where more follow; what is no number is as good as nothing."""
    client = Client()
    for name in ("c", "a", "b"):
        client.ask("POST", "/models", params={"url": "probe.mar", "model_name": name})
    first, last = client.ask("GET", "/models?limit=2")[1], client.ask("GET", "/models?limit=2&next_page_token=2")[1]
    assert ([each["modelName"] for each in first["models"]], first["nextPageToken"]) == (["a", "b"], "2")
    assert ([each["modelName"] for each in last["models"]], "nextPageToken" in last) == (["c"], False)
    for query in ("limit=x", "limit=0", "limit=-1", "next_page_token=zz", f"limit={'9' * 30}"):
        assert len(client.ask("GET", f"/models?{query}")[1]["models"]) == 3


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({}, "url is required"),
        ({"url": 5}, "url must be a text"),
        ({"url": "probe.mar", "batch_size": 0}, "batch_size must be a whole number from 1 to 4096"),
        ({"url": "probe.mar", "batch_size": True}, "batch_size must be"),
        ({"url": "probe.mar", "max_batch_delay": 60001}, "max_batch_delay must be"),
        ({"url": "probe.mar", "initial_workers": "1" * 5000}, "initial_workers must be"),
        ({"url": "probe.mar", "initial_workers": 65}, "0 to 64 workers"),
        ({"url": "probe.mar", "response_timeout": 1.5}, "response_timeout must be"),
        ({"url": "probe.mar", "runtime": "java"}, "Invalid RuntimeType value: java"),
        ({"url": "probe.mar", "handler": "other.py"}, "its own handler"),
        ({"url": "probe.mar", "model_name": "a//b"}, "empty segment"),
        ({"url": "probe.mar", "model_version": "1/2"}, "without a slash"),
    ],
)
def test_wrong_parameters_are_named(parameters: dict[str, Any], said: str) -> None:
    """Nothing is registered; the answer says which parameter is wrong, and how."""
    client = Client()
    status, body = client.ask("POST", "/models", json=parameters)
    assert (status, body["type"]) == (400, "BadRequestException")
    assert said in body["message"]
    assert client.ask("GET", "/models")[1] == {"models": []}


@pytest.mark.parametrize("body", [b"{", b"[]", b"\xff", b"[" * 5000])
def test_body_that_is_no_object_is_the_clients_fault(body: bytes) -> None:
    """400, not a failure of the server; a body that is too long is not read."""
    headers = {"content-type": "application/json"}
    assert Client().ask("POST", "/models", content=body, headers=headers)[0] == 400
    assert Client().ask("POST", "/models", content=b" " * 70_000, headers=headers)[0] == 413


@pytest.mark.parametrize(
    ("situation", "status"),
    [
        (Situation.ARCHIVE_FAILED, 500),
        (Situation.NO_ROOM, 507),
        (Situation.STORE_FAILED, 503),
        (Situation.WORKER_LOST, 503),
    ],
)
def test_load_that_fails_says_why(situation: Situation, status: int) -> None:
    """The status is the situation's, the message the load's; nothing is registered."""
    client = Client()
    client.fleet.broken.add("probe.mar")
    client.fleet.why_broken = situation
    query = {"url": "probe.mar", "initial_workers": "1", "synchronous": "true"}
    found, body = client.ask("POST", "/models", params=query)
    assert (found, body["message"]) == (status, "Failed to start workers: probe.mar is broken")
    assert client.ask("GET", "/models/probe")[0] == 404


def test_time_outs_are_at_most_the_servers() -> None:
    """A client may ask for less, and is told what holds."""
    client = Client()
    for name, asked in (("a", {}), ("b", {"response_timeout": "2"}), ("c", {"response_timeout": "600"})):
        client.ask("POST", "/models", params={"url": "probe.mar", "model_name": name, **asked})
    found = [client.ask("GET", f"/models/{name}")[1][0]["responseTimeout"] for name in "abc"]
    assert found == [5, 2, 5]

"""Multi Model Server's management API over a table of registrations: what is asked, and how refusals are said."""

import asyncio
import json
from typing import Any

import pytest

from server.ipc.operations import ManageModels
from server.settings import Settings
from server.supervisor.model_server_api.mms import MultiModelApi
from server.supervisor.registrations.service import RegistrationService
from tests.server.supervisor.registrations.test_service import Fleet


class Client:
    """Asks an API over a fleet of its own."""

    def __init__(self, **settings: object) -> None:
        self.fleet = Fleet()
        made = Settings.model_validate({"store": "s3://models", **settings})
        self._api = MultiModelApi(RegistrationService("s3://models", self.fleet), made)

    async def ask(self, method: str, path: str, body: bytes = b"") -> tuple[int, Any]:
        """Status and JSON."""
        path, _, query = path.partition("?")
        reply = await self._api.answer(ManageModels(method, path, query, body))
        return reply.status, json.loads(reply.body)


def test_the_life_of_a_model() -> None:
    """Registered without workers, given some, described, and removed."""

    async def live() -> None:
        client = Client()
        assert await client.ask("POST", "/models?url=probe.mar") == (200, {"status": 'Model "probe" registered'})
        assert (await client.ask("POST", "/models?url=probe.mar"))[0] == 409
        assert client.fleet.said == ["announce"], "nothing is loaded yet"
        scaled = await client.ask("PUT", "/models/probe?min_worker=2&synchronous=true")
        assert scaled == (200, {"status": "Workers scaled"})
        status, found = await client.ask("GET", "/models/probe")
        assert (status, found["minWorkers"], found["maxWorkers"], len(found["workers"])) == (200, 2, 2, 2)
        assert (await client.ask("DELETE", "/models/probe"))[0] == 200
        assert client.fleet.said == ["announce", "load probe.mar", "announce", "announce", "unload probe.mar"]
        assert (await client.ask("GET", "/models/probe"))[0] == 404

    asyncio.run(live())


def test_a_container_answers_when_the_model_is_loaded() -> None:
    """It is asked no number of workers and no `synchronous`; elsewhere the answer does not wait for the load."""

    async def register() -> None:
        container = Client(container="multi-model", default_workers_per_model=1)
        assert (await container.ask("POST", "/models", b'{"url": "probe.mar", "model_name": "x"}'))[0] == 200
        assert container.fleet.said == ["load probe.mar", "announce"]
        container.fleet.broken.add("plain.mar")
        status, said = await container.ask("POST", "/models", b'{"url": "plain.mar"}')
        assert (status, said["message"]) == (500, "Failed to start workers: plain.mar is broken")
        assert [row["modelName"] for row in (await container.ask("GET", "/models"))[1]["models"]] == ["x"]
        other = Client()
        other.fleet.may_load.clear()
        assert (await other.ask("POST", "/models?url=probe.mar&initial_workers=1"))[0] == 202

    asyncio.run(register())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "path", "body", "status", "kind"),
    [
        ("POST", "/models", b"", 400, "BadRequestException"),
        ("POST", "/models", b"{bad", 400, "BadRequestException"),
        ("POST", "/models", b"[1]", 400, "BadRequestException"),
        ("POST", "/models", b'{"url": {"a": 1}}', 400, "BadRequestException"),
        ("POST", "/models", b'{"url": "\\ud800"}', 400, "BadRequestException"),
        ("POST", "/models", b"[" * 60_000, 400, "BadRequestException"),
        ("POST", "/models?url=probe.mar&runtime=ruby", b"", 400, "BadRequestException"),
        ("POST", "/models?url=probe.mar&batch_size=0", b"", 400, "BadRequestException"),
        ("POST", "/models?url=probe.mar&initial_workers=-1", b"", 400, "BadRequestException"),
        ("POST", "/models?url=probe.mar&initial_workers=" + "9" * 5000, b"", 400, "BadRequestException"),
        ("POST", "/models?url=probe.mar&initial_workers=65", b"", 400, "BadRequestException"),
        ("POST", "/models?url=" + "a" * 20_000, b"", 400, "BadRequestException"),
        ("POST", "/models?" + "&".join(f"a{i}=1" for i in range(300)), b"", 400, "BadRequestException"),
        ("POST", "/models?url=probe.mar&model_name=%00", b"", 400, "BadRequestException"),
        ("POST", "/models?url=nosuch.mar", b"", 404, "ModelNotFoundException"),
        ("POST", "/models?url=https://evil.test/x.mar", b"", 400, "DownloadModelException"),
        ("POST", "/models?url=/etc/passwd", b"", 404, "ModelNotFoundException"),
        ("GET", "/models?limit=x", b"", 400, "BadRequestException"),
        ("GET", "/models?next_page_token=1", b"", 400, "BadRequestException"),
        ("PUT", "/models/nosuch", b"", 404, "ModelNotFoundException"),
        ("PATCH", "/models/probe", b"", 405, "MethodNotAllowedException"),
        ("DELETE", "/models", b"", 405, "MethodNotAllowedException"),
    ],
)
def test_what_is_wrong_is_said_and_changes_nothing(method: str, path: str, body: bytes, status: int, kind: str) -> None:
    """By status and type; the client's words are bounded before anything is done."""
    client = Client()
    found, said = asyncio.run(client.ask(method, path, body))
    assert (found, said["code"], said["type"]) == (status, status, kind), said
    assert client.fleet.said == []


def test_pages_go_on_after_what_was_removed() -> None:
    """A model that goes between two pages hides no other."""

    async def turn_pages() -> None:
        client = Client()
        for name in "abcd":
            await client.ask("POST", f"/models?url=probe.mar&model_name={name}")
        _, first = await client.ask("GET", "/models?limit=2")
        await client.ask("DELETE", "/models/a")
        await client.ask("DELETE", "/models/b")
        _, second = await client.ask("GET", f"/models?limit=2&next_page_token={first['nextPageToken']}")
        assert [row["modelName"] for row in first["models"] + second["models"]] == list("abcd")
        assert "nextPageToken" not in second

    asyncio.run(turn_pages())

"""The messages of the supervisor to its children, without starting any."""

import asyncio
from pathlib import Path
from typing import Any

import msgspec
import pytest

from server.cli.setting_flags import settings_from
from server.host import Host
from server.ipc import control
from server.ipc.control import ControlError
from server.ipc.operations import (
    AskedByFront,
    AskedByWorker,
    FrontAssignment,
    JoinAsFront,
    JoinAsWorker,
    WorkerAssignment,
)
from server.settings import Settings
from server.supervisor.children import Child, child_environment
from server.supervisor.supervisor import Supervisor

HOST = Host(cores=(0, 1, 2), memory_bytes=2**33, gpus=())
KEYS = {"AKIAEXAMPLE": "the secret"}


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Settings with access keys."""
    monkeypatch.chdir(tmp_path)
    return settings_from({"store": str(tmp_path), "access_keys": [f"{key}={secret}" for key, secret in KEYS.items()]})


def ask_as(settings: Settings, kind: str, operation: JoinAsFront | JoinAsWorker) -> tuple[object, bytes]:
    """What the supervisor answers to its first child of a kind, and the bytes of the answer on the wire."""

    async def scenario() -> tuple[object, bytes]:
        supervisor = Supervisor(settings, HOST)
        child = supervisor.workers[0] if kind == "worker" else supervisor.fronts[0]
        try:
            reply = await supervisor.answer_child(child, operation)
        finally:
            await supervisor.stop()
        return reply, control._encode(reply)

    return asyncio.run(scenario())


def test_a_worker_is_not_sent_the_access_keys(settings: Settings) -> None:
    """Nothing of them is in the bytes that it gets; every other setting is. A front gets the keys."""
    reply, sent = ask_as(settings, "worker", JoinAsWorker())
    assert isinstance(reply, WorkerAssignment)
    assert b"secret" not in sent
    assert b"AKIA" not in sent
    assert reply.settings.access_keys == {}
    assert reply.settings.model_dump(exclude={"access_keys"}) == settings.model_dump(exclude={"access_keys"})
    reply, _ = ask_as(settings, "front", JoinAsFront())
    assert isinstance(reply, FrontAssignment)
    assert {key: secret.get_secret_value() for key, secret in reply.settings.access_keys.items()} == KEYS


def test_a_worker_cannot_ask_what_a_front_may() -> None:
    """The answer to a front has the keys: from a worker's channel the operation is unknown."""
    payload = msgspec.Raw(control._encode(JoinAsFront()))
    with pytest.raises(ControlError, match="no operation 'JoinAsFront' here, only JoinAsWorker, Ready, Fatal"):
        control._parse_operation(AskedByWorker, payload)
    assert control._parse_operation(AskedByFront, payload) == JoinAsFront()


@pytest.mark.parametrize("kind", ["front", "worker"])
@pytest.mark.parametrize("name", ["FLEETCAST_ACCESS_KEYS", "fleetcast_access_keys"])
def test_no_child_inherits_the_access_keys(monkeypatch: pytest.MonkeyPatch, kind: Any, name: str) -> None:
    """The variable that sets them, in either spelling that is read, is not in a child's environment; others are."""
    monkeypatch.setenv(name, "{}")
    monkeypatch.setenv("FLEETCAST_STORE", "s")
    environment = child_environment(Child(kind, 0))
    assert name not in environment
    assert environment["FLEETCAST_STORE"] == "s"


def test_fronts_do_not_inherit_the_stores_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    """A front asks no store, unless it writes asynchronous answers to a bucket; a worker does."""
    names = ("AWS_SECRET_ACCESS_KEY", "aws_session_token", "GOOGLE_APPLICATION_CREDENTIALS")
    for name in names:
        monkeypatch.setenv(name, "x")
    assert not child_environment(Child("front", 0)).keys() & set(names)
    assert child_environment(Child("front", 0, has_output=True)).keys() >= set(names)
    assert child_environment(Child("worker", 0)).keys() >= set(names)

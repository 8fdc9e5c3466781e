"""The control channel: typed operations and replies; an unknown or malformed one is an error that says so."""

import asyncio
import contextlib
import gc
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, strategies

from server.cli.setting_flags import settings_from
from server.errors import Situation
from server.host import WorkerPlan
from server.ipc import control
from server.ipc.control import MAX_MESSAGE, ChannelClosed, ChildChannel, ControlChannel, ControlError, Handler
from server.ipc.operations import (
    AskedByFront,
    AskedByWorker,
    AskedOfFront,
    AskedOfWorker,
    ConnectWorkers,
    JoinAsWorker,
    ListModels,
    LoadModel,
    ModelState,
    Operation,
    Ping,
    Ready,
    UnloadModel,
    WorkerAssignment,
    reply_type,
)
from server.settings import Settings

EVERYTHING = AskedOfFront | AskedOfWorker | AskedByFront | AskedByWorker


@contextlib.asynccontextmanager
async def open_channel(accepted: Any, handler: Handler) -> AsyncIterator[ControlChannel]:
    """The asking end of a channel whose other end accepts these operations."""
    ours, theirs = socket.socketpair()
    ends = [
        await ControlChannel.open(ours, AskedByFront, handler),
        await ControlChannel.open(theirs, accepted, handler),
    ]
    tasks = [asyncio.create_task(end.run()) for end in ends]
    yield ends[0]
    ends[0].close()
    await asyncio.gather(*tasks)


def ask(accepted: Any, operation: Operation[Any], reply: object = None) -> tuple[Any, Any]:
    """What the handler got and what the asker got."""
    got = []

    async def handle(asked: Any) -> object:
        got.append(asked)
        return reply

    async def scenario() -> Any:
        async with open_channel(accepted, handle) as end:
            return await end.ask(operation, 60)

    answered = asyncio.run(scenario())
    return got[0], answered


@pytest.mark.parametrize(
    ("operation", "reply"),
    [
        (Ping(), "fine"),
        (Ready(), None),
        (UnloadModel("au/NSW1.mar"), True),
        (ConnectWorkers({3: "path"}), None),
        (ListModels("p", "a", 3), [ModelState("m", state="loading"), ModelState("n", family=None, bytes=7)]),
    ],
)
def test_operations_and_replies_keep_their_types(operation: Operation[Any], reply: object) -> None:
    """What is asked arrives equal, and so does what is answered."""
    assert ask(EVERYTHING, operation, reply) == (operation, reply)


def test_every_operation_says_what_it_is_answered_with() -> None:
    """The reply's type stands in the operation's base, and msgspec can decode it."""
    for operation in EVERYTHING.__args__:
        msgspec.msgpack.Decoder(reply_type(operation), dec_hook=lambda kind, value: value)


def test_settings_keep_their_types() -> None:
    """Paths, sizes, literals, and what is none: equal and of the same types at the child."""
    settings = settings_from(
        {"store": "s", "disk_cache": "~/d", "access_log": "a", "announce": "b", "overload_status": "429", "pin": ["m"]}
    )
    plan = WorkerPlan(0, "cuda:3", (1, 2), 2, 10**12)
    _, got = ask(AskedByWorker, JoinAsWorker(), WorkerAssignment(settings, plan, "cuda:0", "path", "running"))
    assert got == WorkerAssignment(settings, plan, "cuda:0", "path", "running")
    types = {name: type(getattr(got.settings, name)) for name in Settings.model_fields}
    assert types == {name: type(getattr(settings, name)) for name in Settings.model_fields}
    assert isinstance(got.settings.access_log, Path)


def catch_refusal(accepted: Any, operation: Operation[Any], reply: object = None) -> str:
    """The error that the asker gets."""
    with pytest.raises(ControlError) as caught:
        ask(accepted, operation, reply)
    assert caught.value.situation == Situation.INTERNAL
    return str(caught.value)


class Frobnicate(Operation[None]):
    """No process of ours performs this."""


class Malformed(Operation[None], tag="LoadModel"):
    """A load whose model is a number."""

    model: int


class Foreign(Operation[None], tag="Ping"):
    """A ping with a field that no ping has."""

    extra: int


def test_an_unknown_operation_is_an_error_that_says_so() -> None:
    """It names the operation and those that there are; a front does not load, a worker does not join as a front."""
    assert "no operation 'Frobnicate' here, only Ping, " in catch_refusal(AskedOfFront, Frobnicate())
    assert "no operation 'LoadModel' here" in catch_refusal(AskedOfFront, LoadModel("m"))


def test_a_malformed_operation_is_an_error_that_says_so() -> None:
    """It names the operation, the field and what is wrong with it."""
    text = catch_refusal(AskedOfWorker, Malformed(7))
    assert text == "the operation 'LoadModel' is malformed: Expected `str`, got `int` - at `$.model`"
    assert "unknown field `extra`" in catch_refusal(AskedOfWorker, Foreign(1))


def test_a_reply_of_the_wrong_type_is_an_error_that_says_so() -> None:
    """The asker never sees another type than the operation's."""
    assert "the reply to LoadModel is malformed: Expected `str`" in catch_refusal(AskedOfWorker, LoadModel("m"), 7)


@given(strategies.binary(max_size=60))
def test_any_bytes_are_an_operation_or_an_error(payload: bytes) -> None:
    """Whatever stands in an operation's place, ControlError is all that parsing raises."""
    with contextlib.suppress(ControlError):
        control._parse_operation(AskedOfWorker, msgspec.Raw(payload))


def test_an_error_keeps_its_situation() -> None:
    """What the handler raises arrives with its text and situation; an error without a text by its type's name."""

    async def handle(asked: Any) -> object:
        if isinstance(asked, Ping):
            raise ControlError("no room", Situation.NO_ROOM)
        raise KeyError

    async def scenario() -> None:
        async with open_channel(AskedOfWorker, handle) as end:
            with pytest.raises(ControlError, match="no room") as caught:
                await end.ask(Ping(), 60)
            assert caught.value.situation == Situation.NO_ROOM
            with pytest.raises(ControlError, match="KeyError") as caught:
                await end.ask(LoadModel("m"), 60)
            assert caught.value.situation == 0

    asyncio.run(scenario())


def test_a_message_above_the_limit_is_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither asked nor answered: both are errors at the asker, and the channel serves on."""
    monkeypatch.setattr(control, "MAX_MESSAGE", 1000)

    async def handle(asked: Any) -> object:
        return "x" * (1000 if asked == LoadModel("long") else 10)

    async def scenario() -> None:
        async with open_channel(AskedOfWorker, handle) as end:
            for model in ("long", "m" * 1000):
                with pytest.raises(ControlError, match="the limit is 1000"):
                    await end.ask(LoadModel(model), 60)
            assert await end.ask(LoadModel("m"), 60) == "x" * 10

    asyncio.run(scenario())


GARBAGE = [
    (MAX_MESSAGE + 1).to_bytes(4, "little"),
    b"\x03\0\0\0abc",
    b"\x03\0\0\0a",
    b"\x05",
    b"",
]


@pytest.mark.parametrize("garbage", GARBAGE)
def test_what_is_no_message_closes_the_channel(garbage: bytes) -> None:
    """A length above the limit (before memory is taken for it), no message, half a message: who asked learns it."""

    async def scenario() -> None:
        ours, theirs = socket.socketpair()
        end = await ControlChannel.open(ours, AskedByFront, ChildChannel(AskedByFront)._handle)
        running = asyncio.create_task(end.run())
        asked = asyncio.create_task(end.ask(Ping(), 60))
        theirs.sendall(garbage)
        theirs.shutdown(socket.SHUT_WR)
        await running
        with pytest.raises(ChannelClosed):
            await asked
        with pytest.raises(ChannelClosed):
            await end.ask(Ping(), 60)
        end.tell(Ready())
        theirs.close()

    asyncio.run(scenario())


def test_a_child_that_starts_refuses_until_it_serves() -> None:
    """Asked before it is ready it says so; afterwards its handler answers, and it ends with its channel.

    What it holds when it is ready is left out of garbage collection.
    """

    async def scenario() -> None:
        ours, theirs = socket.socketpair()
        told: asyncio.Queue[Any] = asyncio.Queue()

        async def answer(asked: Any) -> object:
            told.put_nowait(asked)
            return WorkerAssignment(
                settings_from({"store": "s"}), WorkerPlan(0, "cpu", (0,), 1, 1), "cpu", "path", "running"
            )

        async def answer_ping(_: Any) -> object:
            return "pong"

        parent = await ControlChannel.open(ours, AskedByWorker, answer)
        serving = asyncio.create_task(parent.run())
        member = ChildChannel(AskedOfWorker)
        assignment = await member.join(theirs.detach(), JoinAsWorker())
        assert assignment is not None
        assert assignment.socket == "path"
        with pytest.raises(ControlError, match="still starting") as caught:
            await parent.ask(Ping(), 60)
        assert caught.value.situation == Situation.NOT_READY
        frozen = gc.get_freeze_count()
        member.serve(answer_ping)
        assert gc.get_freeze_count() > frozen + 1000
        gc.unfreeze()
        assert await parent.ask(Ping(), 60) == "pong"
        assert [await told.get(), await told.get()] == [JoinAsWorker(), Ready()]
        parent.close()
        await asyncio.gather(serving, member.released)

    asyncio.run(scenario())

"""Names of archives that nobody has registered: with and without their suffix, remembered in bounded bytes."""

import asyncio
import time

import pytest

from model_store.names import ModelName
from server.errors import Refused, Situation
from server.front import archive_requests
from server.front.archive_requests import AskedArchive, StoreNames, ask_archive, parse_parameters
from server.front.dataplane import DataPlane
from server.front.exchange import HttpRequest
from server.front.handler_calls import CallDetails
from server.front.registrations import Served
from tests.server.front.answering import Worker, attach, stay_connected

MISSING = (Situation.NOT_FOUND, b'{"message": "no"}')
UNKNOWN = Refused(Situation.NOT_FOUND, "Model not found")


def make_request() -> HttpRequest:
    """One that has a while."""
    now = time.monotonic()
    return HttpRequest("POST", "/", {}, stay_connected, deadline=now + 60, arrived=now)


def ask_names(names: StoreNames, worker: Worker, *asked: str) -> list[str]:
    """Ask for these one after another. What the worker was asked for."""
    plane = DataPlane(2**20)
    attach(plane, worker)

    async def ask_all() -> None:
        for name in asked:
            await names.ask(name, CallDetails({}), make_request(), plane, UNKNOWN)

    asyncio.run(ask_all())
    return [each.model for each in worker.asked]


def test_a_key_is_found_without_its_suffix_and_remembered() -> None:
    """The second request asks for it at once. One that is gone is looked for again."""
    names, there = StoreNames(), {"a.mar", "b"}
    worker = Worker(lambda asked: b"1" if asked.model in there else MISSING)
    assert ask_names(names, worker, "a", "a", "b") == ["a", "a.mar", "a.mar", "b"]
    there.clear()
    with pytest.raises(Refused, match="Model not found"):
        ask_names(names, worker, "a")
    assert len(names) == 1
    worker.asked.clear()
    there.add("a")
    assert ask_names(names, worker, "a") == ["a"]


def test_a_name_that_is_like_a_served_one_is_told_it() -> None:
    """With or without its suffix; the words that clients of TorchServe know stay at the beginning."""

    async def ask_for() -> str:
        plane, names = DataPlane(2**20), StoreNames()
        attach(plane, Worker(lambda asked: b"1" if asked.model == "au/nsw1.mar" else MISSING))
        await names.ask("au/nsw1", CallDetails({}), make_request(), plane, UNKNOWN)
        unknown = Refused(Situation.NOT_FOUND, "Model not found: au/nsw2")
        with pytest.raises(Refused) as caught:
            await names.ask("au/nsw2", CallDetails({}), make_request(), plane, unknown)
        return caught.value.detail.message

    assert asyncio.run(ask_for()) == "Model not found: au/nsw2; names that are like it: au/nsw1.mar"


def test_names_are_remembered_in_bounded_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are clients' to make up."""
    monkeypatch.setattr(archive_requests, "MAX_NAME_BYTES", 80_000)
    names = StoreNames()
    ask_names(names, Worker(lambda _: b"1"), *(f"{i:03}" for i in range(100)))
    assert 1 <= len(names) < 20


def test_a_version_that_takes_too_long_has_died_to_its_client() -> None:
    """By its own time-out; by the request's it is late. Both are counted."""
    served = Served()

    async def ask_for(timeout_s: float, deadline_s: float) -> Refused:
        plane, request = DataPlane(2**20), make_request()
        attach(plane, Worker(lambda _: (Situation.DEADLINE, b'{"message": "late"}')))
        request.deadline = request.arrived + deadline_s
        with pytest.raises(Refused) as caught:
            await ask_archive(AskedArchive(ModelName("m"), "", timeout_s, served), CallDetails({}), request, plane)
        return caught.value

    own = asyncio.run(ask_for(30, 60))
    assert (own.situation, own.detail.status) == (Situation.MODEL_FAILED, 500)
    assert asyncio.run(ask_for(60, 30)).situation is Situation.DEADLINE
    assert served.requests == 2


@pytest.mark.parametrize("query", [b"&".join([b"a=1"] * 101), b"a" * 20_000])
def test_queries_are_bounded(query: bytes) -> None:
    """In number and bytes."""
    with pytest.raises(Refused) as caught:
        parse_parameters(query)
    assert caught.value.situation is Situation.BAD_REQUEST
    assert parse_parameters(b"a=1&b=%20&a=") == [("a", "1"), ("b", " "), ("a", "")]

"""JSON Lines asked a line at a time, over a worker that answers as a test says."""

import asyncio
import json
import time
from collections.abc import Callable
from contextlib import aclosing
from typing import Any

import pytest

from model_store.names import ModelName
from server.errors import Refused, Situation
from server.front.dataplane import DataPlane
from server.front.forecasting.line_calls import (
    AHEAD_BYTES,
    LINES,
    MOST_AHEAD,
    MOST_LINES,
    LineCalls,
    cut_instances,
    split_lines,
)
from server.front.inference import InferRequest
from server.front.slices import finish_slices
from tests.patience import PATIENCE_S, wait_until
from tests.server.front.answering import Worker, attach

OVERLOADED = Situation.OVERLOADED, b'{"message":"full"}'


def make_calls(answer: Callable[[Any], Any], count: int) -> tuple[LineCalls, Worker]:
    """So many lines, each its number, over a worker; made within a running loop."""
    plane, worker = DataPlane(2**28), Worker(answer)
    attach(plane, worker)
    request = InferRequest(ModelName("m.mar"), b"", LINES, LINES, time.monotonic() + PATIENCE_S)
    return LineCalls(plane, request, [b"%d" % i for i in range(count)]), worker


async def read_all(calls: LineCalls, got: list[bytes]) -> None:
    """Put all answers that come into `got`."""
    async with aclosing(calls.answers()) as answers:
        async for response in answers:
            got += (await response.read(),)


def test_answers_are_in_order_and_the_first_goes_alone() -> None:
    """Then so many are under way as are allowed, whichever is ready first."""

    async def scenario() -> None:
        seen = list[int]()

        def answer(asked: Any) -> bytes:
            seen.append(len(worker.asked))
            return bytes(asked.body)

        calls, worker = make_calls(answer, 100)
        got = list[bytes]()
        await read_all(calls, got)
        assert got == [b"%d" % i for i in range(100)]
        assert seen[0] == 1, "how large answers are is known after the first"
        assert max(seen[1:MOST_AHEAD]) <= 1 + MOST_AHEAD
        assert all(asked.content_type == asked.accept == LINES for asked in worker.asked)

    asyncio.run(scenario())


def test_large_answers_are_asked_one_at_a_time() -> None:
    """What is ahead of a client that has taken one is one, not as many as of small answers."""

    async def scenario() -> None:
        calls, worker = make_calls(lambda _: bytes(AHEAD_BYTES), 10)
        async with aclosing(calls.answers()) as answers:
            await anext(answers)
            await asyncio.sleep(0)
            assert len(worker.asked) == 1
            await anext(answers)
            assert len(worker.asked) == 2

    asyncio.run(scenario())


def test_a_line_without_room_is_asked_again_in_its_turn() -> None:
    """Once; a worker that stays full ends the stream, with what was answered before."""

    async def scenario() -> None:
        refused = set[bytes]()

        def answer(asked: Any) -> Any:
            if asked.body == b"5" and asked.body not in refused:
                refused.add(asked.body)
                return OVERLOADED
            return OVERLOADED if asked.body == b"8" else asked.body

        calls, _ = make_calls(answer, 10)
        got = list[bytes]()
        with pytest.raises(Refused, match="full"):
            await read_all(calls, got)
        assert got == [b"%d" % i for i in range(8)]

    asyncio.run(scenario())


def test_what_is_under_way_is_given_up() -> None:
    """At a failure, and when the caller leaves: each waiting call is cancelled at its worker."""

    async def scenario() -> None:
        calls, worker = make_calls(lambda asked: asked.body if asked.body == b"0" else ..., 10)
        answers = calls.answers()
        await anext(answers)
        waiting = asyncio.ensure_future(anext(answers))
        await asyncio.to_thread(wait_until, lambda: len(worker.waiting) == 9, "all others are under way")
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        assert worker.cancelled == 9

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("body", "lines"),
    [
        (b"a\nb\n", [b"a", b"b"]),
        (b"a\nb", [b"a", b"b"]),
        (b"a\n", None),
        (b"a", None),
        (b"", None),
        (b"a\n\nb", None),
        (b"a\n" * MOST_LINES, [b"a"] * MOST_LINES),
        (b"a\n" * (MOST_LINES + 1), None),
    ],
)
def test_lines_are_split_where_a_worker_would_take_them(body: bytes, lines: list[bytes] | None) -> None:
    """All else goes to the worker as it is, which says what is wrong with it."""
    assert split_lines(body) == lines


def test_instances_become_lines_with_the_configuration_of_all() -> None:
    """Whatever whitespace there is; an empty one too."""
    body = b'{"configuration":{"quantiles":["0.5"]},\r\n "instances":[{"start":"a\\nb",\n"target":[1]}, { }]}'
    lines = finish_slices(cut_instances(body))
    assert all(b"\n" not in line for line in lines)
    wanted = {"quantiles": ["0.5"]}
    assert [json.loads(line) for line in lines] == [
        {"start": "a\nb", "target": [1], "configuration": wanted},
        {"configuration": wanted},
    ]
    many = finish_slices(cut_instances(json.dumps({"instances": [{"target": [1] * 200}] * MOST_LINES}).encode()))
    assert len(many) == MOST_LINES
    assert json.loads(many[-1]) == {"target": [1] * 200, "configuration": {}}


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"[]", "no JSON object"),
        (b"{}", "it is missing"),
        (b'{"instances":[]}', "1 to 1024"),
        (b'{"instances":[%b]}' % b",".join([b"{}"] * (MOST_LINES + 1)), "1 to 1024"),
        (b'{"instances":[{}],"more":1}', "no such key"),
        (b'{"instances":[{}, 7]}', "is an object"),
        (b'{"instances":[%b],"configuration":{"a":"%b"}}' % (b",".join([b"{}"] * 1000), b"b" * 9000), "send fewer"),
    ],
)
def test_what_holds_no_instances_is_refused(body: bytes, said: str) -> None:
    """In words of ours, and before lines are made: a configuration is repeated in each."""
    with pytest.raises(Refused, match=said):
        finish_slices(cut_instances(body))

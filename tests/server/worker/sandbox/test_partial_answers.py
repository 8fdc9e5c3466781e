"""Answers that handlers send while they make them, by the real wheel's `send_intermediate_predict_response`."""

import asyncio
import struct
from types import SimpleNamespace
from typing import Any

import pytest

from server.code_messages import MAX_PARTS, CodeAnswer, CodeRequest
from server.worker.sandbox import child_output
from server.worker.sandbox.child_process import ChildEnded
from server.worker.sandbox.code_host import CodeHost
from server.worker.sandbox.inside.partial_answers import PartialAnswers
from tests.patience import PATIENCE_S
from tests.server.worker.sandbox.code_archives import NO_FIELDS, Asker, make_code_archive, start
from tests.server.worker.test_step_loop import let_loop_run

pytestmark = pytest.mark.slow

pytest.importorskip("ts", reason="torchserve is not installed: pip install fleetcast[torchserve]")

HANDLER = """
import threading, time
from ts.handler_utils.utils import send_intermediate_predict_response

def handle(data, context):
    if data is None:
        return None
    words = [row["body"] for row in data]
    context.set_response_content_type(0, "text/x-words")
    if words[0] == "flood":
        while True:
            send_intermediate_predict_response(["x"] * len(data), context.request_ids, "", 200, context)
    if words[0] == "fails":
        send_intermediate_predict_response(["half"], context.request_ids, "Prediction success", 200, context)
        raise ValueError("after the first part")
    if words[0] == "refuses":
        send_intermediate_predict_response(["no"], context.request_ids, "not this", 418, context)
        return ["rest"]
    for i in range(3):
        answers = [f"{word}{i} " for word in words]
        send_intermediate_predict_response(answers, context.request_ids, "Prediction success", 200, context)
    def late():
        time.sleep(0.05)
        try:
            send_intermediate_predict_response(answers, context.request_ids, "", 200, context)
        except ValueError as error:
            print(error, flush=True)
    threading.Thread(target=late).start()
    return [f"{word}." for word in words]
"""


async def ask(child: Asker, *words: str, streams: tuple[bool, ...]) -> tuple[Any, list[tuple[int, CodeAnswer]]]:
    """A batch's outcome, and the parts before it."""
    done: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    parts: list[tuple[int, CodeAnswer]] = []
    requests = [
        CodeRequest("same", "text/plain", "", word.encode(), NO_FIELDS, (), {}, wants)
        for word, wants in zip(words, streams, strict=True)
    ]
    child.child.run(requests, done.set_result, lambda index, answer: parts.append((index, answer)))
    return await asyncio.wait_for(done, PATIENCE_S), parts


def test_parts_come_before_the_answers_or_joined_with_them(host: CodeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    """As each request wants; requests of a batch may have the same id. What comes too late is refused in the child."""
    said: list[str] = []
    monkeypatch.setattr(child_output, "log", SimpleNamespace(info=lambda _, **fields: said.append(fields["text"])))

    async def test() -> None:
        child = Asker(start(host, make_code_archive(HANDLER)))
        outcome, parts = await ask(child, "a", "b", streams=(True, False))
        assert [(index, part.body) for index, part in parts] == [(0, b"a0 "), (0, b"a1 "), (0, b"a2 ")]
        assert [part.content_type for _, part in parts] == ["text/x-words"] * 3
        assert [answer.body for answer in outcome] == [b"a.", b"b0 b1 b2 b."]
        await let_loop_run(lambda: any("this one has returned" in line for line in said))
        outcome, parts = await ask(child, "c", streams=(False,))
        assert (outcome[0].body, outcome[0].content_type, parts) == (b"c0 c1 c2 c.", "text/x-words", [])
        await child.close()

    asyncio.run(test())


def test_a_failure_behind_parts_is_the_answers_own(host: CodeHost) -> None:
    """Whoever joins has no half of an answer; whoever streams learns it at the end, or by a part with a status."""

    async def test() -> None:
        child = Asker(start(host, make_code_archive(HANDLER)))
        outcome, parts = await ask(child, "fails", streams=(True,))
        assert (parts[0][1].body, outcome[0].failed, outcome[0].message) == (b"half", True, "Prediction failed")
        outcome, _ = await ask(child, "fails", streams=(False,))
        assert (outcome[0].failed, outcome[0].body) == (True, b"")
        outcome, _ = await ask(child, "refuses", streams=(False,))
        assert (outcome[0].failed, outcome[0].status, outcome[0].message) == (True, 418, "not this")
        _, parts = await ask(child, "refuses", streams=(True,))
        assert (parts[0][1].failed, parts[0][1].status) == (True, 418)
        await child.close()

    asyncio.run(test())


def test_a_flood_of_parts_ends_its_own_process(host: CodeHost) -> None:
    """The worker takes so many and no more."""

    async def test() -> None:
        child = Asker(start(host, make_code_archive(HANDLER)))
        outcome, parts = await ask(child, "flood", streams=(True,))
        assert isinstance(outcome, ChildEnded)
        assert "parts" in str(outcome)
        assert len(parts) == MAX_PARTS
        await child.close()

    asyncio.run(test())


@pytest.mark.parametrize(
    "message", [b"", b"\x00", struct.pack("!ii", 200, 5) + b"abc", struct.pack("!iii", 200, 0, 3) + b"ab"]
)
def test_what_is_no_message_of_torchserves_is_the_handlers_mistake(message: bytes) -> None:
    """It gets a ValueError, and the channel to the worker nothing."""
    sent: list[Any] = []
    answers = PartialAnswers()
    answers.connect(sent.append)
    answers.begin([0], [CodeRequest("x", "", "", b"", streams=True)])
    with pytest.raises(ValueError, match="create_predict_response"):
        answers.sendall(message)
    assert not sent

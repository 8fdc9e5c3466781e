"""SageMaker's response streams over a worker that answers as a test says; botocore reads the frames."""

import asyncio
import json
from typing import Any

import pytest
from botocore.eventstream import EventStreamBuffer

from server.errors import Situation
from server.front.app import App
from server.front.dialects.sagemaker_streams import SageMakerStreams
from server.metrics import FrontMetrics
from server.settings import Settings
from tests.server.front.answering import Answered, Worker, ask, attach

SETTINGS = Settings.model_validate({"store": "models"})
FORECASTER = json.dumps(
    {
        "parameters": {
            "forecast": {
                "frequency": "1h",
                "time_zone": "UTC",
                "history_length": 1,
                "prediction_length": 1,
                "dynamic_feat": [],
                "quantile_levels": [],
                "products": ["p"],
            }
        }
    }
).encode()


def ask_stream(worker: Worker, body: bytes, content_type: str) -> Answered:
    """The stream of one call; nothing is held when it has ended."""
    app = App(SETTINGS, FrontMetrics(), (SageMakerStreams,))
    attach(app.plane, worker)
    headers = {"Content-Type": content_type, "X-Amzn-SageMaker-Inference-Component": "m.mar"}
    answered = asyncio.run(ask(app, "POST", "/endpoints/f/invocations-response-stream", body, headers))
    assert app.plane.held.size == 0
    return answered


def read_events(stream: bytes) -> list[Any]:
    """Each payload; of an exception its type and what it says."""
    buffer: Any = EventStreamBuffer()
    buffer.add_data(stream)
    return [_read_event(each) for each in buffer]


def _read_event(event: Any) -> Any:
    kind = event.headers.get(":exception-type")
    return event.payload if kind is None else (kind, json.loads(event.payload))


def test_the_pieces_of_a_large_answer_leave_as_they_come() -> None:
    """A frame each, and nothing waits for the whole."""
    answered = ask_stream(Worker(lambda _: [b"one", b"two", b"three"]), b"{}", "application/json")
    assert read_events(answered.body) == [b"one", b"two", b"three"]
    assert "content-length" not in answered.headers
    assert answered.headers["x-fleetcast-cache"] == "hit"


def test_a_worker_that_dies_with_half_an_answer_breaks_the_stream() -> None:
    """The status was 200 by then; boto3 raises what the last frame says."""
    answered = ask_stream(Worker(lambda _: [b"one", b"two", b""]), b"{}", "application/json")
    *parts, (kind, said) = read_events(answered.body)
    assert (answered.status, parts, kind) == (200, [b"one", b"two"], "ModelStreamError")
    assert said["ErrorCode"] == "StreamBroken"
    assert "died with half" in said["Message"]


@pytest.mark.parametrize(
    ("situation", "kind"),
    [
        (Situation.STORE_FAILED, "InternalStreamFailure"),
        (Situation.NO_ROOM, "ModelStreamError"),
        (Situation.DEADLINE, "ModelStreamError"),
    ],
)
def test_a_line_that_the_server_cannot_answer_ends_the_stream(situation: Situation, kind: str) -> None:
    """What another try may answer is the service's failure, all else the model's error; lines before it have come."""

    def answer(asked: Any) -> Any:
        if not asked.body:
            return FORECASTER
        return (situation, b'{"message":"so it is"}') if asked.body == b"2" else b"<%b>\n" % asked.body

    answered = ask_stream(Worker(answer), b"0\n1\n2\n3\n", "application/jsonlines")
    *parts, (found, said) = read_events(answered.body)
    assert (parts, found, said["Message"]) == ([b"<0>\n", b"<1>\n"], kind, "so it is")
    assert ("ErrorCode" in said) == (kind == "ModelStreamError")


def test_an_archive_with_code_gets_its_lines_at_once() -> None:
    """It may know no lines: only what says of itself that it forecasts is asked line by line."""
    worker = Worker(lambda asked: asked.body.upper() if asked.body else b"{}")
    answered = ask_stream(worker, b"a\nb\n", "application/jsonlines")
    assert b"".join(read_events(answered.body)) == b"A\nB\n"
    assert [asked.body for asked in worker.asked] == [b"", b"a\nb\n"]

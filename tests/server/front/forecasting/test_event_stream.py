"""Frames of Amazon's event stream, read by botocore's own parser."""

import json
from typing import Any

import pytest
from botocore.eventstream import EventStreamBuffer

from server.front.forecasting.event_stream import PART_BYTES, write_events, write_frame
from server.front.slices import finish_slices
from tests.e2e.server import ROOT


def read_parts(stream: bytes) -> list[bytes]:
    """The payloads, after botocore has checked both checksums of each frame."""
    buffer: Any = EventStreamBuffer()
    buffer.add_data(stream)
    found = list(buffer)
    assert all(each.headers[":event-type"] == "PayloadPart" for each in found)
    return [each.payload for each in found]


def test_a_frame_is_the_recorded_one() -> None:
    """Byte for byte what boto3 was recorded to read."""
    for line in (ROOT / "tests" / "golden" / "sagemaker-more.jsonl").read_text().splitlines():
        record = json.loads(line)
        if record["call"] == "invoke_endpoint_with_response_stream":
            stream = write_frame(b'{"mean":[1.0]}\n') + write_frame(b'{"mean":[2.0]}\n')
            assert stream.hex() == record["reply"]["body"]["hex"]
            return
    pytest.fail("the recording has no stream")


@pytest.mark.parametrize(
    ("body", "parts"),
    [(b"", []), (b"a\nb\n", [b"a\n", b"b\n"]), (b"a\n\nb", [b"a\n", b"\n", b"b"]), (b"{}", [b"{}"])],
)
def test_lines_are_parts(body: bytes, parts: list[bytes]) -> None:
    """A line a part, and the last one without its end as well."""
    assert read_parts(finish_slices(write_events(body, lines=True))) == parts


def test_a_large_answer_is_several_parts() -> None:
    """No frame is larger than the bound, and nothing is lost."""
    body = bytes(range(256)) * (PART_BYTES // 256 * 2 + 1)
    parts = read_parts(finish_slices(write_events(body, lines=False)))
    assert b"".join(parts) == body
    assert max(map(len, parts)) == PART_BYTES
    assert b"".join(read_parts(finish_slices(write_events(body, lines=True)))) == body

"""Frames of Amazon's event stream, read by botocore's own parser."""

import json
from typing import Any

import pytest
from botocore.eventstream import EventStreamBuffer

from server.front.forecasting.event_stream import PART_BYTES, EventWriter, write_exception, write_frame
from tests.e2e.server import ROOT


def read_parts(stream: bytes) -> list[bytes]:
    """The payloads, after botocore has checked both checksums of each frame."""
    buffer: Any = EventStreamBuffer()
    buffer.add_data(stream)
    found = list(buffer)
    assert all(each.headers[":event-type"] == "PayloadPart" for each in found)
    return [each.payload for each in found]


def write_whole(body: bytes, *, lines: bool, piece: int = 2**30) -> bytes:
    """The frames of a body that comes in pieces of so many bytes."""
    writer = EventWriter(lines=lines)
    frames = [writer.write(body[at : at + piece]) for at in range(0, len(body), piece)]
    return b"".join((*frames, writer.finish()))


def read_recording(call: str) -> str:
    """The recorded body of a call, in hexadecimal digits."""
    for line in (ROOT / "tests" / "golden" / "sagemaker-more.jsonl").read_text().splitlines():
        record = json.loads(line)
        if record["call"] == call:
            return str(record["reply"]["body"]["hex"])
    pytest.fail(f"the recording has no {call}")


def test_a_frame_is_the_recorded_one() -> None:
    """Byte for byte what boto3 was recorded to read."""
    stream = write_frame(b'{"mean":[1.0]}\n') + write_frame(b'{"mean":[2.0]}\n')
    assert stream.hex() == read_recording("invoke_endpoint_with_response_stream")


def test_an_exception_is_the_recorded_one() -> None:
    """The recording's JSON has a space after each colon and comma; all else is byte for byte the same."""
    recorded = bytes.fromhex(read_recording("invoke_endpoint_with_response_stream, err"))
    ours = write_frame(b'{"mean":[1.0]}\n') + write_exception(
        "ModelStreamError", "worker died", "ModelInvocationTimeExceeded"
    )
    found = []
    for stream in (recorded, ours):
        buffer: Any = EventStreamBuffer()
        buffer.add_data(stream)
        found.append([(each.headers, each.payload.replace(b'": "', b'":"').replace(b", ", b",")) for each in buffer])
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("body", "parts"),
    [(b"", []), (b"a\nb\n", [b"a\n", b"b\n"]), (b"a\n\nb", [b"a\n", b"\n", b"b"]), (b"{}", [b"{}"])],
)
def test_lines_are_parts(body: bytes, parts: list[bytes]) -> None:
    """A line a part, and the last one without its end as well."""
    assert read_parts(write_whole(body, lines=True)) == parts
    assert read_parts(write_whole(body, lines=True, piece=1)) == parts


def test_a_large_answer_is_several_parts() -> None:
    """No frame is larger than the bound, and nothing is lost."""
    body = bytes(range(256)) * (PART_BYTES // 256 * 2 + 1)
    parts = read_parts(write_whole(body, lines=False))
    assert b"".join(parts) == body
    assert max(map(len, parts)) == PART_BYTES
    assert b"".join(read_parts(write_whole(body, lines=True))) == body

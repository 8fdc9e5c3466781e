"""Frames: what is written is read back however the stream is cut; bytes that are no frame end in WireError."""

import contextlib
from itertools import pairwise
from typing import TypeVar

import msgspec
import pytest
from hypothesis import given, strategies

from server.errors import Situation
from server.ipc.frames import (
    CHUNK,
    MAX_FRAME,
    VERSION,
    CacheResult,
    Cancel,
    Credit,
    Data,
    Frame,
    FrameReader,
    Held,
    Request,
    Response,
    Stage,
    Stages,
    Tier,
    TracedRequest,
    WireError,
    append_frame,
)

T = TypeVar("T")

IDS = strategies.integers(0, 2**63 - 1)
TEXTS = strategies.text(strategies.characters(exclude_categories=["Cs"]), max_size=40)
BODIES = strategies.binary(max_size=200)
MORE = strategies.integers(0, 10**9)
CODES = strategies.tuples(*map(strategies.sampled_from, (Situation, CacheResult, Tier)))


def _is_short(text: str) -> bool:
    return len(text) <= 32  # a name of a number


def list_three(values: strategies.SearchStrategy[T]) -> strategies.SearchStrategy[list[T]]:
    """Lists of three."""
    return strategies.lists(values, min_size=3, max_size=3)


def make_request(ident: int, deadline: int, texts: list[str], body: bytes, more: int) -> Request:
    """A request with its body, or with the first part of one that is `more` bytes longer."""
    name, kind, accept = texts
    return Request(ident, deadline, name, kind, accept, len(body) + more, body, deadline // 2)


def make_response(
    ident: int,
    codes: tuple[Situation, CacheResult, Tier],
    texts: list[str],
    times: list[int],
    body: bytes,
    more: int,
) -> Response:
    """A response with its body or the first part of it."""
    version, kind, _ = texts
    queue, load, inference = times
    return Response(ident, *codes, version, kind, queue, load, inference, len(body) + more, body)


def make_traced(ident: int, texts: list[str], body: bytes) -> TracedRequest:
    """A request that is traced."""
    model, content_type, accept = texts
    return TracedRequest(
        ident, 0, model, content_type, accept, len(body), body, trace_id="0af7651916cd43dd8448eb211c80319c"
    )


STAGES = strategies.builds(
    Stage, TEXTS, IDS, IDS, strategies.dictionaries(TEXTS.filter(_is_short), IDS, max_size=3), TEXTS
)
FRAMES: strategies.SearchStrategy[Frame] = strategies.one_of(
    strategies.builds(make_request, IDS, IDS, list_three(TEXTS), BODIES, MORE),
    strategies.builds(make_response, IDS, CODES, list_three(TEXTS), list_three(IDS), BODIES, MORE),
    strategies.builds(Data, IDS, BODIES),
    strategies.builds(Cancel, IDS),
    strategies.builds(Credit, IDS, IDS),
    strategies.builds(make_traced, IDS, list_three(TEXTS), BODIES),
    strategies.builds(Stages, IDS, strategies.lists(STAGES, max_size=4)),
)
REQUEST = Request(1, 2, "model", "type", "accept", 4, b"body")
RESPONSE = Response(1, Situation.OK, CacheResult.HIT, Tier.NONE, "v", "type", 1, 2, 3, 4, b"body")


def pack(*frames: Frame) -> bytes:
    """The frames' bytes, one after another."""
    buffer = bytearray()
    for frame in frames:
        append_frame(buffer, frame)
    return bytes(buffer)


def read(*pieces: bytes) -> list[Frame]:
    """All frames of a stream that arrives in these pieces."""
    reader = FrameReader()
    return [frame for piece in pieces for frame in reader.feed(piece)]


def cut(stream: bytes, places: list[int]) -> list[bytes]:
    """The stream in pieces, cut at these places."""
    ends = sorted({place % (len(stream) + 1) for place in places} | {0, len(stream)})
    return [stream[a:b] for a, b in pairwise(ends)]


def frame_payload(payload: bytes | bytearray) -> bytes:
    """A prefix that is right, and any payload."""
    return len(payload).to_bytes(4, "little") + bytes([VERSION]) + payload


@pytest.mark.slow
@given(strategies.lists(FRAMES, max_size=8), strategies.lists(strategies.integers(0, 5000), max_size=20))
def test_frames_survive_the_wire_in_any_pieces(frames: list[Frame], places: list[int]) -> None:
    """Every frame type with any content is read back equal and in order, wherever the stream is cut."""
    assert read(*cut(pack(*frames), places)) == frames


def test_frames_survive_the_wire_byte_by_byte() -> None:
    """The worst cut of all, through prefixes, texts and bodies."""
    frames: list[Frame] = [REQUEST, RESPONSE, Cancel(9), Data(4, b"part"), Credit(5, 6)]
    assert read(*(bytes([byte]) for byte in pack(*frames))) == frames


def test_what_is_read_keeps_its_type() -> None:
    """Codes come back as members of their enumerations, bodies as bytes that hold no larger buffer."""
    (response,) = read(pack(RESPONSE))
    assert isinstance(response, Response)
    assert (type(response.situation), type(response.cache), type(response.tier)) == (Situation, CacheResult, Tier)
    assert type(response.body) is bytes


def test_the_longest_frame_fits() -> None:
    """A whole chunk with heads as long as a front lets through: the longest name in UTF-8, latin-1 headers in UTF-8."""
    frame = Request(1, 2, "\U0001f4c8" * 1024, "ÿ" * 1024, "ÿ" * 1024, CHUNK, b"x" * CHUNK)
    assert read(pack(frame)) == [frame]


@given(strategies.binary(max_size=300), strategies.lists(strategies.integers(0, 300), max_size=5))
def test_garbage_raises_nothing_but_wire_error(garbage: bytes, places: list[int]) -> None:
    """Any bytes in any pieces give frames, an unfinished frame, or WireError; with a right prefix too."""
    with contextlib.suppress(WireError):
        read(*cut(garbage, places))
    with contextlib.suppress(WireError):
        read(*cut(frame_payload(garbage), places))


@pytest.mark.slow
@given(
    FRAMES, strategies.lists(strategies.tuples(strategies.integers(0, 400), strategies.integers(0, 255)), min_size=1)
)
def test_wrong_bytes_in_a_payload_stay_in_their_frame(frame: Frame, flips: list[tuple[int, int]]) -> None:
    """Lengths, types and texts inside a frame may lie: WireError, or a frame that ends where its bytes end."""
    payload = bytearray(pack(frame)[5:])
    for place, value in flips:
        payload[place % len(payload)] = value
    behind = Data(7, b"secret" * 30)
    with contextlib.suppress(WireError):
        first, second = read(frame_payload(payload) + pack(behind))
        assert second == behind
        assert isinstance(first, Cancel | Credit | Held | Stages) or len(first.body) <= len(payload)


def change_field(frame: Frame, place: int, value: object) -> bytes:
    """A frame with another value in one of its fields; the type comes first, the id second."""
    fields = msgspec.msgpack.decode(pack(frame)[5:])
    fields[place] = value
    return frame_payload(msgspec.msgpack.encode(fields))


@pytest.mark.parametrize(
    ("stream", "match"),
    [
        ((MAX_FRAME + 1).to_bytes(4, "little") + pack(Cancel(1))[4:], str(MAX_FRAME + 1)),
        (pack(Cancel(1))[:4] + b"\x01" + pack(Cancel(1))[5:], "version 1"),
        (frame_payload(b""), "truncated"),
        (
            frame_payload(b"\x97\x01\x01\x01\xdb\xff\xff\xff\xff"),
            "length",
        ),  # a name of 4 GiB, and fields that are not there
        (frame_payload(b"\x98\x01\x01\x01\xdb\xff\xff\xff\xff"), "truncated"),  # a name of 4 GiB
        (frame_payload(b"\xdd\xff\xff\xff\xff\x04\x01"), "length|truncated"),  # four billion fields
        (frame_payload(b"\x93\x04\x01" + b"\x91" * 70_000), "length"),  # nested so deep that skipping it would recurse
        (frame_payload(b"\x91" * 70_000), "int"),
        (frame_payload(pack(Cancel(1))[5:] + b"\x00"), "trailing"),
        (change_field(Cancel(1), 0, 12), "Invalid value 12"),
        (change_field(Cancel(1), 1, -1), ">= 0"),
        (change_field(Cancel(1), 1, 2**63), "<="),
        (change_field(Credit(1, 5), 2, -1), ">= 0"),
        (change_field(Data(1, b""), 2, bytes(CHUNK + 1)), str(CHUNK)),
        (change_field(REQUEST, 6, 3), "4 bytes is announced as 3"),
        (change_field(RESPONSE, 10, 3), "4 bytes is announced as 3"),
        (change_field(RESPONSE, 2, 200), "200"),
        (change_field(RESPONSE, 3, 200), "200"),
        (pack(REQUEST).replace(b"model", b"mode\xff"), "(?i)utf-?8"),
    ],
)
def test_lies_are_named(stream: bytes, match: str) -> None:
    """Each kind of wrong length, version, type, number and text raises WireError that says which."""
    with pytest.raises(WireError, match=match):
        read(stream)


@pytest.mark.parametrize(
    "frame",
    [
        Request(1, 2, "m" * 120_000, "", "", 0, b""),
        Request(1, 2, "m" * 40_000, "", "", CHUNK, bytes(CHUNK)),
        Request(1, 2, "\ud800", "", "", 0, b""),
        Cancel(2**64),
        Credit(1, 2**64),
    ],
)
def test_what_fits_no_frame_is_not_written(frame: Frame) -> None:
    """Texts and numbers beyond their bounds raise WireError, and the frames written before are as they were."""
    buffer = bytearray(pack(REQUEST))
    with pytest.raises(WireError):
        append_frame(buffer, frame)
    assert bytes(buffer) == pack(REQUEST)

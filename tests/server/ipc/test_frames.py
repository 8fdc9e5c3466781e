"""Frames: what is packed is read back however the stream is cut; lies end in WireError; credits are kept."""

import contextlib
from itertools import pairwise
from typing import TypeVar

import pytest
from hypothesis import given, settings, strategies
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from server.ipc import frames as wire
from server.ipc.frames import (
    CHUNK,
    MAX_FRAME,
    WINDOW,
    Cancel,
    Credit,
    Data,
    Frame,
    Inbox,
    Outbox,
    Request,
    Response,
    pack,
)

T = TypeVar("T")

IDS = strategies.integers(0, 2**64 - 1)
TEXTS = strategies.text(strategies.characters(exclude_categories=["Cs"]), max_size=40)
BODIES = strategies.binary(max_size=200)
BYTE = strategies.integers(0, 255)
MICROS = strategies.integers(0, 2**32 - 1)


def requests(ident: int, deadline: int, texts: list[str], body: bytes, more: int) -> Request:
    """A request with its body, or with the first part of one that is `more` bytes longer."""
    name, kind, accept = texts
    return Request(ident, deadline, name, kind, accept, len(body) + more, body)


def responses(ident: int, codes: list[int], texts: list[str], times: list[int], body: bytes, more: int) -> Response:
    """A response with its body or the first part of it."""
    situation, cache, tier = codes
    queue, load, inference = times
    version, kind = texts
    size = len(body) + more
    return Response(ident, situation, cache, tier, version, kind, queue, load, inference, size, body)


def three(values: strategies.SearchStrategy[T]) -> strategies.SearchStrategy[list[T]]:
    """Lists of three."""
    return strategies.lists(values, min_size=3, max_size=3)


MORE = strategies.integers(0, 10**9)
FRAMES: strategies.SearchStrategy[Frame] = strategies.one_of(
    strategies.builds(requests, IDS, IDS, three(TEXTS), BODIES, MORE),
    strategies.builds(responses, IDS, three(BYTE), three(TEXTS).map(lambda t: t[:2]), three(MICROS), BODIES, MORE),
    strategies.builds(Data, IDS, BODIES),
    strategies.builds(Cancel, IDS),
    strategies.builds(Credit, IDS, MICROS),
)


def read(*pieces: bytes) -> list[Frame]:
    """All frames of a stream that arrives in these pieces."""
    reader = wire.Reader()
    return [frame for piece in pieces for frame in reader.feed(piece)]


def cut(stream: bytes, places: list[int]) -> list[bytes]:
    """The stream in pieces, cut at these places."""
    ends = sorted({place % (len(stream) + 1) for place in places} | {0, len(stream)})
    return [stream[a:b] for a, b in pairwise(ends)]


@given(strategies.lists(FRAMES, max_size=8), strategies.lists(strategies.integers(0, 5000), max_size=20))
def test_frames_survive_the_wire_in_any_pieces(frames: list[Frame], places: list[int]) -> None:
    """Every frame type with any content is read back equal and in order, wherever the stream is cut."""
    stream = b"".join(map(pack, frames))
    assert read(*cut(stream, places)) == frames


def test_frames_survive_the_wire_byte_by_byte() -> None:
    """The worst cut of all, through heads, texts and bodies."""
    frames: list[Frame] = [Request(1, 2, "au/NSW1.mar", "a", "b", 3, b"xyz"), Cancel(9), Data(4, b"part"), Credit(5, 6)]
    assert read(*(bytes([byte]) for byte in b"".join(map(pack, frames)))) == frames


def test_the_longest_frame_fits() -> None:
    """A whole chunk with heads as long as a front lets through: the longest name in UTF-8, latin-1 headers in UTF-8."""
    frame = Request(1, 2, "\U0001f4c8" * 1024, "ÿ" * 1024, "ÿ" * 1024, CHUNK, b"x" * CHUNK)
    assert read(pack(frame)) == [frame]


@given(strategies.binary(max_size=300), strategies.lists(strategies.integers(0, 300), max_size=5))
def test_garbage_raises_nothing_but_wire_error(garbage: bytes, places: list[int]) -> None:
    """Whatever arrives: frames, patience for more, or WireError."""
    with contextlib.suppress(wire.WireError):
        read(*cut(garbage, places))


@given(FRAMES, strategies.lists(strategies.tuples(strategies.integers(0, 400), BYTE), min_size=1, max_size=4))
def test_wrong_bytes_in_a_payload_stay_in_their_frame(frame: Frame, flips: list[tuple[int, int]]) -> None:
    """Lengths and texts inside a frame may lie: WireError, or a frame that reaches not beyond its own bytes."""
    packed = bytearray(pack(frame))
    payload = len(packed) - 16
    for place, value in flips[: payload and len(flips)]:
        packed[16 + place % payload] = value
    behind = Data(7, b"secret" * 30)
    with contextlib.suppress(wire.WireError):
        first, second = read(bytes(packed) + pack(behind))
        assert second == behind
        assert isinstance(first, Cancel | Credit) or len(first.body) <= payload


def lie(frame: Frame, at: int, value: bytes) -> bytes:
    """A packed frame with other bytes at a place of its payload."""
    packed = bytearray(pack(frame))
    packed[16 + at : 16 + at + len(value)] = value
    return bytes(packed)


REQUEST = Request(1, 2, "model", "type", "accept", 4, b"body")


@pytest.mark.parametrize(
    ("stream", "match"),
    [
        (lie(REQUEST, 16, b"\xff\xff"), "lengths inside"),  # the name ends behind the frame
        (lie(REQUEST, 8, b"\x03"), "lengths inside"),  # more body than announced
        (lie(REQUEST, 22, b"\xff"), "utf-8"),
        (pack(Cancel(1))[:4] + b"\x02" + pack(Cancel(1))[5:], "version 2"),
        (pack(Cancel(1))[:5] + b"\x09" + pack(Cancel(1))[6:], "no frame has type 9"),
        (b"\x03" + pack(Credit(1, 5))[1:], "no frame has type 5 and 3 bytes"),
        (b"\x04" + pack(Credit(1, 5))[1:5] + b"\x01" + pack(Credit(1, 5))[6:], "type 1"),  # too short for a request
        ((MAX_FRAME + 1).to_bytes(4, "little") + pack(Cancel(1))[4:], str(MAX_FRAME + 1)),
        ((CHUNK + 1).to_bytes(4, "little") + pack(Data(1, b""))[4:] + bytes(CHUNK + 1), "lengths inside"),
    ],
)
def test_lies_are_named(stream: bytes, match: str) -> None:
    """Each kind of wrong length, version, type and text raises WireError that says which."""
    with pytest.raises(wire.WireError, match=match):
        read(stream)


@pytest.mark.parametrize(
    "frame",
    [
        Data(1, bytes(CHUNK + 1)),
        Request(1, 2, "m", "", "", CHUNK + 1, bytes(CHUNK + 1)),
        Request(1, 2, "m" * 70_000, "", "", 0, b""),
        Request(1, 2, "m" * 20_000, "", "", CHUNK, bytes(CHUNK)),
        Request(1, -1, "m", "", "", 0, b""),
        Request(1, 2, "\ud800", "", "", 0, b""),
        Response(2**64, 0, 0, 0, "", "", 0, 0, 0, 0, b""),
        Credit(1, 2**32),
    ],
)
def test_what_fits_no_frame_is_not_packed(frame: Frame) -> None:
    """Bodies, texts and numbers beyond their fields raise WireError here, not at the peer."""
    with pytest.raises(wire.WireError):
        pack(frame)


def test_times_beyond_their_field_are_cut() -> None:
    """A wait of more than 71 minutes is reported as 71 minutes, and breaks nothing."""
    (response,) = read(pack(Response(1, 0, 1, 0, "v", "t", 2**40, 2**32, 7, 0, b"")))
    assert isinstance(response, Response)
    assert (response.queue_us, response.load_us, response.inference_us) == (2**32 - 1, 2**32 - 1, 7)


def test_small_bodies_travel_in_their_frame() -> None:
    """Up to a chunk nothing is kept."""
    outbox = Outbox()
    assert outbox.start(1, bytes(CHUNK)) == bytes(CHUNK)
    assert (len(outbox), outbox.chunk()) == (0, None)


def sent(outbox: Outbox) -> list[tuple[int, int]]:
    """Id and size of each chunk that may leave now."""
    return [
        (data.id, len(data.body)) for frame in iter(outbox.chunk, None) for data in read(frame) if type(data) is Data
    ]


def test_bodies_take_turns_within_their_windows() -> None:
    """Two large bodies alternate; each stops at its window; credit for one lets that one go on."""
    outbox = Outbox()
    for ident in (1, 2):
        assert len(outbox.start(ident, bytes(10 * CHUNK))) == CHUNK
    assert sent(outbox) == [(1, CHUNK), (2, CHUNK)] * (WINDOW // CHUNK - 1)
    outbox.credit(2, CHUNK + 5)
    assert sent(outbox) == [(2, CHUNK), (2, 5)]
    assert repr(outbox) == f"<Outbox 2 bodies, {6 * CHUNK + 5 * CHUNK - 5} bytes>"


def test_credit_of_nothing_is_nothing() -> None:
    """Empty, late and unknown credit moves no turn and sends no empty frame."""
    outbox = Outbox()
    outbox.start(1, bytes(CHUNK + WINDOW))
    assert len(sent(outbox)) == WINDOW // CHUNK - 1
    outbox.credit(1, 0)
    outbox.credit(1, 0)
    outbox.credit(2, 10)
    assert sent(outbox) == []
    outbox.credit(1, WINDOW)
    assert sent(outbox) == [(1, CHUNK)]
    outbox.credit(1, 10)
    assert (sent(outbox), len(outbox)) == ([], 0)


def test_more_body_than_announced_is_an_error() -> None:
    """The peer's lie is named with the request; parts of unknown requests are dropped without a word."""
    inbox = Inbox()
    inbox.start(Request(1, 2, "m", "", "", 5, b"abc"))
    assert inbox.add(Data(2, b"x")) is None
    assert inbox.add(Data(1, b"d")) is None
    with pytest.raises(wire.WireError, match="request 1 has more body"):
        inbox.add(Data(1, b"ef"))


class BodiesMachine(RuleBasedStateMachine):
    """A sender's Outbox and a receiver's Inbox at random: what arrives whole is what was sent, within its window."""

    def __init__(self) -> None:
        super().__init__()
        self.outbox, self.inbox = Outbox(), Inbox()
        self.bodies: dict[int, bytes] = {}
        self.uncredited: dict[int, int] = {}
        self.last = 0

    @rule(size=strategies.integers(CHUNK + 1, 3 * WINDOW))
    def start(self, size: int) -> None:
        """A large body begins with one chunk."""
        self.last += 1
        body = self.last.to_bytes(1, "little") * (size - 4) + b"end!"
        first = self.outbox.start(self.last, body)
        assert len(first) == CHUNK
        self.inbox.start(Request(self.last, 0, "m", "", "", size, first))
        self.bodies[self.last] = body
        self.uncredited[self.last] = CHUNK

    @rule(count=strategies.integers(1, 12))
    def send(self, count: int) -> None:
        """Chunks arrive, never more than the window of one body without credit."""
        for _ in range(count):
            frame = self.outbox.chunk()
            if frame is None:
                return
            (data,) = read(frame)
            assert isinstance(data, Data)
            assert 0 < len(data.body) <= CHUNK
            self.uncredited[data.id] += len(data.body)
            assert self.uncredited[data.id] <= WINDOW
            whole = self.inbox.add(data)
            if whole is not None:
                assert whole.body == self.bodies.pop(data.id)
                assert not self.inbox.knows(data.id)

    @precondition(lambda self: self.bodies)
    @rule(pick=strategies.integers(0, 100), share=strategies.floats(0, 1))
    def credit(self, pick: int, share: float) -> None:
        """The receiver has passed some of it on."""
        ident = sorted(self.bodies)[pick % len(self.bodies)]
        room = int(self.uncredited[ident] * share)
        self.uncredited[ident] -= room
        self.outbox.credit(ident, room)

    @precondition(lambda self: self.bodies)
    @rule(pick=strategies.integers(0, 100))
    def drop(self, pick: int) -> None:
        """Cancelled in the middle: both ends forget it, what is still under way is ignored."""
        ident = sorted(self.bodies)[pick % len(self.bodies)]
        self.outbox.drop(ident)
        self.outbox.drop(ident)
        assert self.inbox.drop(ident) is True
        assert self.inbox.drop(ident) is False
        del self.bodies[ident]
        self.outbox.credit(ident, CHUNK)
        assert self.inbox.add(Data(ident, b"late")) is None

    @invariant()
    def both_ends_know_the_same(self) -> None:
        """Nothing is left of bodies that have ended; those with room take turns once each."""
        assert (len(self.outbox), len(self.inbox)) == (len(self.bodies), len(self.bodies))
        turns = list(self.outbox._turn)
        assert sorted(turns) == sorted(ident for ident in self.bodies if self.uncredited[ident] < WINDOW)

    def teardown(self) -> None:
        """With credit for all, all bodies arrive."""
        for _ in range(20):
            for ident in list(self.bodies):
                self.outbox.credit(ident, self.uncredited[ident])
                self.uncredited[ident] = 0
            self.send(1000)
        assert self.bodies == {}


TestBodiesMachine = BodiesMachine.TestCase
TestBodiesMachine.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)

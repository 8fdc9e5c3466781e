"""Large bodies: chunks take turns, credit bounds what is under way, and parts are joined to the body that was sent."""

import pytest
from hypothesis import settings, strategies
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from server.ipc.bodies import WINDOW, Inbox, Outbox
from server.ipc.frames import CHUNK, Data, FrameReader, Request, WireError, append_frame


def over_the_wire(chunk: Data) -> Data:
    """The chunk as the peer reads it."""
    buffer = bytearray()
    append_frame(buffer, chunk)
    (data,) = FrameReader().feed(bytes(buffer))
    assert isinstance(data, Data)
    return data


def take_chunks(outbox: Outbox) -> list[tuple[int, int]]:
    """Id and size of each chunk that may leave now."""
    return [(chunk.id, len(chunk.body)) for chunk in iter(outbox.next_chunk, None)]


def test_bodies_take_turns_within_their_windows() -> None:
    """Two large bodies alternate; each stops at its window; credit for one lets that one go on."""
    outbox = Outbox()
    for ident in (1, 2):
        outbox.start(ident, bytes(10 * CHUNK))
    assert take_chunks(outbox) == [(1, CHUNK), (2, CHUNK)] * (WINDOW // CHUNK - 1)
    outbox.add_credit(2, CHUNK + 5)
    assert take_chunks(outbox) == [(2, CHUNK), (2, 5)]
    assert repr(outbox) == f"<Outbox 2 bodies, {6 * CHUNK + 5 * CHUNK - 5} bytes>"


def test_credit_of_nothing_is_nothing() -> None:
    """Empty, late and unknown credit moves no turn and sends no empty frame."""
    outbox = Outbox()
    outbox.start(1, bytes(CHUNK + WINDOW))
    assert len(take_chunks(outbox)) == WINDOW // CHUNK - 1
    outbox.add_credit(1, 0)
    outbox.add_credit(1, 0)
    outbox.add_credit(2, 10)
    assert take_chunks(outbox) == []
    outbox.add_credit(1, WINDOW)
    assert take_chunks(outbox) == [(1, CHUNK)]
    outbox.add_credit(1, 10)
    assert (take_chunks(outbox), len(outbox)) == ([], 0)


def test_more_body_than_announced_is_an_error() -> None:
    """The peer's lie is named with the request; parts of unknown requests are dropped without a word."""
    inbox = Inbox()
    inbox.start(Request(1, 2, "m", "", "", 5, b"abc"))
    assert inbox.add(Data(2, b"x")) is None
    assert inbox.add(Data(1, b"d")) is None
    with pytest.raises(WireError, match="request 1 has more body"):
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
        self.outbox.start(self.last, body)
        self.inbox.start(Request(self.last, 0, "m", "", "", size, body[:CHUNK]))
        self.bodies[self.last] = body
        self.uncredited[self.last] = CHUNK

    @rule(count=strategies.integers(1, 12))
    def send(self, count: int) -> None:
        """Chunks arrive, never more than the window of one body without credit."""
        for _ in range(count):
            chunk = self.outbox.next_chunk()
            if chunk is None:
                return
            data = over_the_wire(chunk)
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
        self.outbox.add_credit(ident, room)

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
        self.outbox.add_credit(ident, CHUNK)
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
                self.outbox.add_credit(ident, self.uncredited[ident])
                self.uncredited[ident] = 0
            self.send(1000)
        assert self.bodies == {}


TestBodiesMachine = BodiesMachine.TestCase
TestBodiesMachine.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)

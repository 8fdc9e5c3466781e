"""Parts of answers under credit."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.errors import Situation
from server.ipc.bodies import WINDOW
from server.ipc.frames import CHUNK, CacheResult, Partial, Response, Tier
from server.ipc.part_streams import PartStreams, cut_part


def make_response(ident: int, body: bytes = b"") -> Response:
    """The end of an answer."""
    return Response(ident, Situation.OK, CacheResult.HIT, Tier.NONE, "v", "text/plain", 0, 0, 0, len(body), body)


def test_parts_leave_at_once_and_the_end_behind_them() -> None:
    """Within the window nothing waits, and nothing is remembered after the end."""
    streams = PartStreams()
    (part,) = streams.add(Partial(1, "text/plain", b"a", b"head"))
    assert part == Partial(1, "text/plain", b"a", b"head")
    assert streams.has(1)
    assert list(streams.end(make_response(1, b"z"))) == [make_response(1, b"z")]
    assert (streams.has(1), streams.held_bytes) == (False, 0)


@given(st.lists(st.integers(0, 3 * CHUNK), max_size=12), st.lists(st.integers(1, 2 * CHUNK), max_size=60))
def test_no_more_is_under_way_than_the_client_has_taken_and_a_window(sizes: list[int], credit: list[int]) -> None:
    """In order, whole, and the end last: whatever sizes and credit. One frame may begin below the window's end."""
    streams, sent, taken = PartStreams(), list[Partial | Response](), 0
    for size in sizes:
        sent += streams.add(Partial(7, "t", bytes([size % 251]) * size))
        assert sum(len(each.body) for each in sent) < WINDOW + CHUNK
    sent += streams.end(make_response(7, b"end"))
    for room in credit:
        taken += room
        sent += streams.add_credit(7, room)
        body = sum(len(each.body) for each in sent if isinstance(each, Partial))
        assert body < taken + WINDOW + CHUNK
    sent += streams.add_credit(7, 100 * CHUNK)
    assert sent[-1] == make_response(7, b"end")
    assert b"".join(each.body for each in sent[:-1]) == b"".join(bytes([size % 251]) * size for size in sizes)
    assert all(len(each.body) <= CHUNK for each in sent)
    assert (streams.held_bytes, streams.has(7)) == (0, False)


def test_an_answer_that_nobody_wants_holds_nothing() -> None:
    """Its client has left."""
    streams = PartStreams()
    list(streams.add(Partial(1, "t", b"x" * (WINDOW + 5 * CHUNK))))
    assert streams.held_bytes == 5 * CHUNK
    streams.drop(1)
    streams.drop(2)
    assert (streams.held_bytes, list(streams.add_credit(1, CHUNK))) == (0, [])


@pytest.mark.parametrize("size", [0, 1, CHUNK, CHUNK + 1])
def test_only_the_first_frame_of_a_part_has_the_head(size: int) -> None:
    """It would count twice otherwise."""
    frames = list(cut_part(Partial(1, "t", b"x" * size, b"head")))
    assert [each.head for each in frames] == [b"head", *([b""] * (len(frames) - 1))]
    assert sum(len(each.body) for each in frames) == size

"""Calls for many models between front and worker: what is written is read, and nothing else is."""

import random

import pytest

from server.errors import Situation
from server.ipc.frames import CacheResult, Tier, WireError
from server.ipc.together import (
    LENGTH,
    MOST_ITEMS,
    AskedTogether,
    ItemAnswer,
    read_answered,
    read_asked,
    write_answered,
    write_asked,
)


def make_answer(size: int, situation: Situation = Situation.OK) -> ItemAnswer:
    """One item's head."""
    return ItemAnswer(situation, CacheResult.HIT, Tier.DISK, "v1", "application/json", 1, 0, 2, size, "flat=1")


def test_what_is_written_is_read() -> None:
    """Instances and answers of any size, also none, come back in their order."""
    instances = [b'{"a":1}', b"", b"x" * 1000]
    body = write_asked(AskedTogether(["a.mar", "b.mar", "ü.mar"], list(map(len, instances)), b"{}", 99), instances)
    head, found = read_asked(body)
    assert (head.models, head.configuration, head.most_bytes) == (["a.mar", "b.mar", "ü.mar"], b"{}", 99)
    assert [bytes(each) for each in found] == instances
    answers = [make_answer(3), make_answer(0, Situation.DEADLINE)]
    told = read_answered(write_answered(answers, [b"abc", b""]), 2)
    assert [(each, bytes(body)) for each, body in told] == [(answers[0], b"abc"), (answers[1], b"")]


@pytest.mark.parametrize(
    ("models", "sizes"),
    [([], []), (["a"], []), (["a"], [4]), (["a"], [2]), (["a"] * (MOST_ITEMS + 1), [0] * MOST_ITEMS + [3])],
)
def test_a_head_that_does_not_fit_is_refused(models: list[str], sizes: list[int]) -> None:
    """No items, too many, or instances that are not exactly the rest of the body."""
    with pytest.raises(WireError):
        read_asked(write_asked(AskedTogether(models, sizes, b"{}", 1), [b"abc"]))


def test_answers_for_other_items_are_refused() -> None:
    """As many answers as items."""
    with pytest.raises(WireError, match="2 items are answered by 1"):
        read_answered(write_answered([make_answer(1)], [b"a"]), 2)


def test_any_bytes_are_read_or_refused() -> None:
    """Bodies that were cut or changed: a WireError, or what they now say, and no other exception."""
    rng = random.Random(5)
    body = write_asked(AskedTogether(["a.mar", "b.mar"], [3, 4], b"{}", 99), [b"abc", b"defg"])
    refused = 0
    for _ in range(2000):
        changed = bytearray(body[: rng.randrange(len(body) + 1)])
        for _ in range(rng.randrange(4)):
            if changed:
                changed[rng.randrange(min(len(changed), LENGTH + 40))] = rng.randrange(256)
        try:
            read_asked(bytes(changed))
        except WireError:
            refused += 1
    assert refused > 1500

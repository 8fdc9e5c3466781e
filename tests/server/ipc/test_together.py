"""Calls for many models between front and worker: what is written is read, and nothing else is."""

import random
from array import array
from itertools import combinations
from typing import Any

import msgspec
import pytest

from server.errors import Situation
from server.ipc.frames import CacheResult, Tier, WireError
from server.ipc.packed import BlockRow, BlockRows, NumbersBlock, TableRow, measure_instance, write_instance
from server.ipc.together import (
    LENGTH,
    MOST_ITEMS,
    Answer,
    AnsweredTogether,
    AskedTogether,
    SharedAnswer,
    read_answered,
    read_asked,
    write_answered,
    write_asked,
)


def make_answer(situation: Situation = Situation.OK) -> SharedAnswer:
    """What came of items."""
    return SharedAnswer(situation, CacheResult.HIT, Tier.DISK, "application/json", 1, 0, 2, "flat=1")


def make_rows(count: int, *, uniform: bool) -> list[TableRow]:
    """Rows with a covariate and a category, alike in what can be said once or in nothing."""
    return [
        TableRow(
            f"s{0 if uniform else i}",
            None if uniform else f"i{i}",
            "f",
            ["load", "region"],
            [array("f", [i] * (3 if uniform else i)).tobytes(), array("f", [-i] * 5).tobytes()],
            [i],
        )
        for i in range(count)
    ]


def test_what_is_written_is_read() -> None:
    """Instances and answers of any size, also none, come back in their order."""
    instances = [b'{"a":1}', b"", b"x" * 1000]
    body = write_asked(AskedTogether(["a.mar", "b.mar", "ü.mar"], list(map(len, instances)), b"{}", 99), instances)
    head, found, columns = read_asked(body)
    assert columns is None
    assert (head.models, head.configuration, head.most_bytes) == (["a.mar", "b.mar", "ü.mar"], b"{}", 99)
    assert [bytes(each) for each in found] == instances
    answers = [make_answer(), make_answer(Situation.DEADLINE)]
    told = read_answered(write_answered(answers, [0, 1, 0], [b"abc", b"", b"de"]), 3)
    assert [each for each, _ in told] == [answers[0], answers[1], answers[0]]
    assert [bytes(body) for _, body in told if not isinstance(body, NumbersBlock)] == [b"abc", b"", b"de"]


@pytest.mark.parametrize("uniform", [True, False])
@pytest.mark.parametrize("count", [1, 4])
def test_rows_of_a_table_travel_as_columns(count: int, uniform: bool) -> None:
    """Each row is what it was, and the bytes of a series lie together."""
    rows = make_rows(count, uniform=uniform)
    body = write_asked(AskedTogether(["m.mar"] * count, [], b"{}", 99, numbers=True), rows)
    head, found, columns = read_asked(body)
    assert columns is not None
    assert [bytes(each) for each in columns.series] == [b"".join(row.series[k] for row in rows) for k in range(2)]
    assert (len(columns.head.starts) == 1) is (uniform or count == 1)
    assert (found, columns.count) == ([], count)
    cut_rows = [columns.cut(at) for at in reversed(range(count))][::-1]
    assert [msgspec.structs.replace(each, series=[*map(bytes, each.series)]) for each in cut_rows] == rows
    assert [columns.measure(at) for at in range(count)] == [*map(measure_instance, rows)]
    for cut in (1, len(body) // 2):
        with pytest.raises(WireError):
            read_asked(body[:-cut])
    assert head.numbers


def test_columns_that_do_not_fit_are_refused() -> None:
    """Sizes, starts or categories for another number of rows, or numbers of no known type."""
    changes: tuple[dict[str, Any], ...] = (
        {"starts": []},
        {"starts": ["a"] * 3},
        {"sizes": []},
        {"cats": [[1]]},
        {"code": "x"},
    )
    for change in changes:
        body = write_asked(AskedTogether(["m"] * 2, [], b"{}", 99), make_rows(2, uniform=True))
        head = read_asked(body).head
        assert head.columns is not None
        changed = msgspec.structs.replace(head, columns=msgspec.structs.replace(head.columns, **change))
        packed = msgspec.msgpack.encode(changed)
        rest = body[LENGTH + int.from_bytes(body[:LENGTH], "little") :]
        with pytest.raises(WireError):
            read_asked(len(packed).to_bytes(LENGTH, "little") + packed + rest)


def test_forecasts_of_a_block_come_back_as_rows_of_one() -> None:
    """In any order and with gaps; an item that failed has its own bytes beside them."""
    columns = [array("f", range(6)).tobytes(), array("f", range(10, 16)).tobytes()]
    block = NumbersBlock("s", 2, True, ["0.5"], columns)
    for rows in ([0, 1, 2], [2, 0], [1]):
        bodies: list[Answer] = [*(BlockRow(block, row) for row in rows), b"no"]
        shared = [make_answer(), make_answer(Situation.OVERLOADED)]
        told = read_answered(write_answered(shared, [0] * len(rows) + [1], bodies), len(bodies))
        found = [body for _, body in told if isinstance(body, NumbersBlock)]
        assert len(found) == len(rows)
        assert len({id(each) for each in found}) == 1
        for k, column in enumerate(columns):
            assert bytes(found[0].columns[k]) == b"".join(column[8 * row : 8 * row + 8] for row in rows)
        last = told[-1][1]
        assert not isinstance(last, NumbersBlock)
        assert bytes(last) == b"no"


@pytest.mark.parametrize("others", [0, 2])
def test_whole_blocks_come_back_beside_rows_of_others(others: int) -> None:
    """Blocks whose rows are all answers, of items in any order, with and without other answers beside them."""
    blocks = [
        NumbersBlock(name, 1, True, [], [array("f", [k * 10 + i for i in range(3)]).tobytes()])
        for k, name in enumerate("abc")
    ]
    beside: list[Answer] = [BlockRow(blocks[2], 2), b"no"]
    bodies: list[Answer] = [b"", b"", b"", b"", b"", b"", *beside[:others]]
    body = write_answered([make_answer()], [0] * len(bodies), bodies, [(blocks[0], [4, 0, 2]), (blocks[1], [1, 3, 5])])
    told = [each for _, each in read_answered(body, len(bodies))]
    found: list[tuple[str, float]] = []
    for i, each in enumerate(told):
        if isinstance(each, NumbersBlock):
            row = sum(other is each for other in told[:i])
            found.append((each.start, memoryview(each.columns[0]).cast("f")[row]))
    expected = [("a", 1), ("b", 10), ("a", 2), ("b", 11), ("a", 0), ("b", 12), ("c", 22)]
    assert found == expected[: 6 + others // 2]
    assert [bytes(each) for each in told if not isinstance(each, NumbersBlock)] == [b"no"][: others // 2]


def test_a_block_is_a_sequence_of_its_rows() -> None:
    """As a list of them would be."""
    block = NumbersBlock("s", 1, True, [], [bytes(12)])
    rows = BlockRows(block, 3)
    assert [row.at for row in rows] == [0, 1, 2]
    assert ([row.at for row in rows[1:]], rows[-1].at, len(rows)) == ([1, 2], 2, 3)
    assert all(row.block is block for row in rows)
    with pytest.raises(IndexError):
        rows[3]
    assert repr(rows) == "<BlockRows of 3 forecasts>"


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
        read_answered(write_answered([make_answer()], [0], [b"a"]), 2)
    with pytest.raises(WireError, match="by nothing"):
        read_answered(write_answered([make_answer()], [1], [b"a"]), 1)


def test_rows_of_a_block_come_in_the_order_of_its_items() -> None:
    """Whatever order they were written in. Items that are answered twice, or are none, are refused."""
    block = NumbersBlock("s", 2, True, ["0.5"], [array("f", range(k, k + 4)).tobytes() for k in (0, 10)])
    written = write_answered([make_answer()], [0, 0], [BlockRow(block, 0), BlockRow(block, 1)])
    end = LENGTH + int.from_bytes(written[:LENGTH], "little")
    head = msgspec.msgpack.decode(written[LENGTH:end], type=AnsweredTogether)

    def read(*places: list[int]) -> list[Any]:
        head.blocks = [msgspec.structs.replace(head.blocks[0], places=each) for each in places]
        packed = msgspec.msgpack.encode(head)
        return [each for _, each in read_answered(len(packed).to_bytes(LENGTH, "little") + packed + written[end:], 2)]

    first, second = read([1, 0])
    assert first is second
    assert [[*memoryview(each).cast("f")] for each in first.columns] == [[2, 3, 0, 1], [12, 13, 10, 11]]
    for places in ([0, 0], [1, 1], [0, 2], [2, 1]):
        with pytest.raises(WireError, match="block"):
            read(places)
    with pytest.raises(WireError, match="twice"):
        read([1], [1])


@pytest.mark.parametrize("uniform", [True, False])
def test_some_rows_are_columns_too(uniform: bool) -> None:
    """Any of them are what they were; of those that follow each other the numbers are the whole's, and no copies."""
    rows = make_rows(5, uniform=uniform)
    whole = read_asked(write_asked(AskedTogether(["m.mar"] * 5, [], b"{}", 99), rows)).columns
    assert whole is not None
    for places in (each for count in range(1, 6) for each in combinations(range(5), count)):
        some, wanted = whole.select(places), [rows[at] for at in places]
        assert [write_instance(some.cut(at)) for at in range(some.count)] == [*map(write_instance, wanted)]
        assert some.measure_all(range(some.count)) == [*map(measure_instance, wanted)]
        assert whole.measure_all(places) == [*map(measure_instance, wanted)]
        head = AskedTogether(["m.mar"] * len(places), [], b"{}", 99)
        assert write_asked(head, some) == write_asked(head, wanted)
        if places[-1] - places[0] + 1 == len(places):
            assert all(each.obj is whole.series[0].obj for each in some.series)


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

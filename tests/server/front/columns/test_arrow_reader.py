"""Arrow streams as pyarrow and polars write them: read to the number, or refused with what to do, in bounded memory."""

import io
import json
import random
import tracemalloc
from typing import Any

import pytest

from server.errors import Refused
from server.front.columns.arrow_reader import MOST_CHANGED, MOST_METADATA
from server.front.raw_json import MAX_ITEMS
from tests.server.front.columns.tables import START, TABLE, describe, pa, read_items, read_table, write_table

FAR = (2**31 - 1).to_bytes(4, "little")


@pytest.mark.parametrize("rows", [None, 1, 2])
@pytest.mark.parametrize(
    "kind",
    [pa.list_(pa.float64()), pa.large_list(pa.float64()), pa.list_(pa.int64()), pa.list_(pa.int32())],
    ids=str,
)
def test_lists_of_any_kind_in_any_batches(kind: Any, rows: int | None) -> None:
    """Names, starts and numbers come back in their order."""
    target = pa.array([[1, 2], [3], []], kind)
    found = read_items(write_table({**TABLE, "target": target}, rows=rows))
    assert [model for model, _ in found] == ["a.mar", "b.mar", "c.mar"]
    assert [json.loads(text) for _, text in found] == [{"start": START, "target": each} for each in ([1, 2], [3], [])]


def test_missing_values_covariates_and_what_is_shared() -> None:
    """Nulls and NaN are missing; covariates and categories have names; start and configuration may be said once."""
    columns = {
        "model": pa.array(["a.mar", "b.mar"], pa.large_string()),
        "item_id": ["x", None],
        "target": pa.array([[1.0, None, float("nan")], [4.0, 5.0, 6.0]], pa.list_(pa.float32(), 3)),
        "load": pa.array([[1.0, 2.0], [3.0, 4.0]], pa.list_(pa.float32())),
        "region": [7, 8],
    }
    body = write_table(columns, {"start": START, "configuration": '{"seed":1}'})
    assert read_table(body).shared["configuration"] == '{"seed":1}'
    first, second = (json.loads(text) for _, text in read_items(body))
    named = {"names": ["load", "region"], "start": START}
    assert first == {"item_id": "x", "target": [1.0, None, None], "dynamic_feat": [[1.0, 2.0]], "cat": [7], **named}
    assert second == {"target": [4.0, 5.0, 6.0], "dynamic_feat": [[3.0, 4.0]], "cat": [8], **named}


def test_a_sliced_table_and_polars() -> None:
    """A slice of a larger table has offsets that do not begin at 0; polars writes large lists and strings."""
    whole = pa.table({"model": ["x", "a.mar", "b.mar"], "start": [START] * 3, "target": [[9.0], [1.0], [2.0]]})
    assert [json.loads(text)["target"] for _, text in read_items(write_table(whole.slice(1)))] == [[1.0], [2.0]]
    polars = pytest.importorskip("polars")
    stream = io.BytesIO()
    frame = polars.DataFrame({"model": ["a.mar"], "start": [START], "target": [[1.0, None]]})
    frame.write_ipc_stream(stream, compat_level=polars.CompatLevel.oldest())
    assert json.loads(read_items(stream.getvalue())[0][1])["target"] == [1.0, None]
    stream = io.BytesIO()
    frame.write_ipc_stream(stream)
    with pytest.raises(Refused, match="compat_level"):
        read_table(stream.getvalue())


def test_a_row_that_is_wrong_is_refused_alone() -> None:
    """Null or bad names, null series, and rows that are too large: errors of their rows."""
    columns = {
        "model": ["a.mar", None, "../x", "d.mar", "e.mar"],
        "start": [START, START, START, None, START],
        "target": pa.array([[1.0], [1.0], [1.0], [1.0], None], pa.list_(pa.float64())),
    }
    good, *wrong = read_items(write_table(columns))
    assert good[0] == "a.mar"
    assert [describe(each).split(":")[0] for each in wrong] == ["model", "model", "start", "target"]
    (large,) = read_items(write_table({"model": ["a"], "start": [START], "target": [[1.0] * 100]}), 500)
    assert "max_body_bytes" in str(large)
    one = {name: each[:1] for name, each in TABLE.items()}
    (mixed,) = read_items(write_table({**one, "x": pa.array([[1.0]], pa.list_(pa.float32()))}))
    assert "two types" in str(mixed)


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"start": [START], "target": [[1.0]]}, "model: the table has no such column"),
        ({"model": ["a"], "start": [START]}, "target: the table has no such column"),
        ({"model": ["a"], "target": [[1.0]]}, "start: the table has no such column"),
        ({**TABLE, "target": [1.0, 2.0, 3.0]}, "float64; take strings, int64 or lists"),
        ({**TABLE, "target": [["a"], [], []]}, "list of utf8"),
        ({**TABLE, "target": pa.array([[[1.0]], [], []])}, "list of list"),
        ({**TABLE, "load": [{"a": 1}] * 3}, "struct"),
        ({**TABLE, "load": [{"a": 1, "b": 2}] * 3}, "nested"),
        ({**TABLE, "model": [1, 2, 3]}, "must be of strings"),
        ({**TABLE, "note": ["x", "y", "z"]}, "only model, start, item_id"),
        ({**TABLE, "model": pa.array(["a", "b", "c"]).dictionary_encode()}, "dictionary of utf8"),
        ({**TABLE, "target": pa.array([[1.0], [], []], pa.list_(pa.float16()))}, "list of float16"),
        ({**TABLE, "x" * 101: [1, 2, 3]}, "longer than 100"),
        ({**TABLE, **{f"c{i}": [1, 2, 3] for i in range(64)}}, "64 are the most"),
        (pa.table({name: each[:1] for name, each in TABLE.items()}).slice(1), "not 0"),
        (pa.table({name: (each[:1]) * (MAX_ITEMS + 1) for name, each in TABLE.items()}), f"1 to {MAX_ITEMS} rows"),
    ],
)  # fmt: skip
def test_tables_that_are_no_call(columns: Any, says: str) -> None:
    """Each is refused with the column and what to send instead."""
    with pytest.raises(Refused) as caught:
        read_table(write_table(columns))
    assert says in f"{caught.value.detail.field}: {caught.value}"


@pytest.mark.parametrize("compression", ["lz4", "zstd"])
def test_compressed_buffers_are_refused(compression: str) -> None:
    """A buffer of a megabyte that says a gigabyte is not looked into: HTTP has a bounded way to compress."""
    with pytest.raises(Refused, match="Content-Encoding"):
        read_table(write_table({**TABLE, "target": [[0.0] * 1000] * 3}, compression=compression))


def test_work_for_each_number_is_bounded() -> None:
    """Whole numbers and nulls are changed one by one, so that there may be only so many."""
    many = [list(range(MOST_CHANGED + 1))]
    with pytest.raises(Refused, match="send float64"):
        read_table(write_table({"model": ["a"], "start": [START], "target": pa.array(many, pa.list_(pa.int32()))}))
    nulls = pa.array([[None] * (MOST_CHANGED + 1)], pa.list_(pa.float32()))
    with pytest.raises(Refused, match="send NaN"):
        read_table(write_table({"model": ["a"], "start": [START], "target": nulls}))


@pytest.mark.slow
def test_hostile_streams_are_refused_or_read_within_bounds() -> None:
    """Streams that were cut, changed and spliced: refused or read, no other exception, and memory of a few bodies."""
    rng = random.Random(7)
    columns = {**TABLE, "load": [[1.0], [None], [2.0]], "region": [1, None, 3], "item_id": ["x", None, "y"]}
    bodies = [write_table(columns, {"start": START}), write_table(columns, rows=1)]
    assert max(map(len, bodies)) < MOST_METADATA
    outcomes, unexpected = {True: 0, False: 0}, 0
    tracemalloc.start()
    try:
        for _ in range(3000):
            body = bytearray(rng.choice(bodies))
            for _ in range(rng.randrange(1, 4)):
                at, new = rng.randrange(len(body)), rng.choice((b"\xff", b"\0" * 4, b"\xff" * 8, rng.randbytes(4), FAR))
                body[at : at + len(new)] = new
            try:
                read_items(bytes(body[: rng.choice((len(body), len(body), rng.randrange(len(body))))]))
                outcomes[True] += 1
            except (Refused, ValueError) as error:  # ValueError: infinite numbers have no JSON
                unexpected += not isinstance(error, Refused) and "infinite" not in str(error)
                outcomes[False] += 1
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert not unexpected
    assert min(outcomes.values()) > 100
    assert peak < 3_000_000

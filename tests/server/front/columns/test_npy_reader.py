"""Files of numpy: read to the number as the same table by Arrow, or refused with what to do, in bounded memory."""

import io
import json
import pickle
import random
import re
import struct
import tracemalloc
import zipfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as drawn

from server.errors import Refused
from server.front.call_items import Item
from server.front.columns.asked_table import AskedTable, check_columns, cut_rows
from server.front.columns.npy_header import MOST_HEADER
from server.front.columns.npy_reader import MOST_GATHERED, MOST_INTS, read_npy
from server.front.raw_json import MAX_ITEMS
from server.front.slices import finish_slices
from server.ipc.packed import TableRow, write_instance

START = "2026-01-01 00:00:00"
MODELS = np.array(["a.mar", "b.mar"])
TARGET = np.array([[1.0, 2.5], [3.0, np.nan]])
MEMBERS: Mapping[str, Any] = {"model": MODELS, "target": TARGET, "start": np.array(START)}
EXPECTED = [
    ("a.mar", {"start": START, "target": [1.0, 2.5]}),
    ("b.mar", {"start": START, "target": [3.0, None]}),
]
FIELDS = [("model", "U5"), ("start", "M8[s]"), ("target", "f8", (2,))]
ROWS = np.array([("a.mar", START, [1.0, 2.5]), ("b.mar", START, [3.0, np.nan])], FIELDS)


def lay_rows(fields: Any) -> Any:
    """The same rows with fields of other types, or in another order."""
    rows = np.zeros(len(ROWS), fields)
    for name in ROWS.dtype.names or ():
        rows[name] = ROWS[name]
    return rows


def save_one(array: Any, *, fortran: bool = False) -> bytes:
    """An array as a .npy file, with pickles where it has objects."""
    file = io.BytesIO()
    np.save(file, np.asfortranarray(array) if fortran else array, allow_pickle=True)
    return file.getvalue()


def save_all(members: Mapping[str, Any] = MEMBERS) -> bytes:
    """Arrays as an .npz file."""
    file = io.BytesIO()
    np.savez(file, **members)
    return file.getvalue()


def read_table(body: bytes) -> AskedTable:
    """The call in a file. Raises Refused."""
    table = finish_slices(read_npy(body))
    check_columns(table)
    return table


def read_items(body: bytes, limit: int = 10**6) -> list[Any]:
    """Each row as (model, instance), or its refusal."""
    found = finish_slices(cut_rows(read_table(body), limit, "max_body_bytes"))
    return [
        (each.model, json.loads(write_instance(cast("TableRow", each.instance)))) if isinstance(each, Item) else each
        for each in found
    ]


@pytest.mark.parametrize(
    "body",
    [
        save_one(ROWS),
        save_one(ROWS[::-1][::-1]),
        save_one(lay_rows(np.dtype(FIELDS, align=True))),
        save_one(lay_rows([("target", "f4", (2,)), ("model", "S9"), ("start", "M8[m]")])),
        save_one(lay_rows([*FIELDS[:1], ("start", "M8[ns]"), FIELDS[2]])),
        save_all(),
        save_all({**MEMBERS, "model": MODELS.astype("S")}),
        save_all({**MEMBERS, "target": np.asfortranarray(TARGET)}),
        save_all({**MEMBERS, "target": TARGET.astype(np.float32)}),
        save_all({**MEMBERS, "start": np.datetime64(START)}),
        save_all({**MEMBERS, "start": np.array([START, START], "M8[h]")}),
        save_all({**MEMBERS, "start": np.array([START, START])}),
        save_all({**MEMBERS, "start": np.datetime64("2026-01-01")}),
    ],
)  # fmt: skip
def test_what_numpy_writes_is_a_call(body: bytes) -> None:
    """Rows with fields, padded or not, or members; texts of both kinds; times of any unit; both orders."""
    assert read_items(body) == EXPECTED


def test_covariates_categories_and_what_is_shared() -> None:
    """As in an Arrow table: named by the archive; a configuration for all; int columns become float64."""
    members = {
        **MEMBERS,
        "item_id": np.array(["x", ""]),
        "load": np.array([[1, 2, 3], [4, 5, 6]]),
        "wind": np.asfortranarray(np.array([[1, 2, 3], [4, 5, 6]], np.int32)),
        "region": np.array([7, -8], np.int32),
        "configuration": np.array('{"seed":1}'),
    }
    body = save_all(members)
    assert read_table(body).shared == {"start": START, "configuration": '{"seed":1}'}
    (_, first), (_, second) = read_items(body)
    named = {"names": ["load", "wind", "region"], "start": START}
    features = [[[1.0, 2.0, 3.0]] * 2, [[4.0, 5.0, 6.0]] * 2]
    assert first == {"item_id": "x", "target": [1.0, 2.5], "dynamic_feat": features[0], "cat": [7], **named}
    assert second == {"target": [3.0, None], "dynamic_feat": features[1], "cat": [-8], **named}
    fields = [*FIELDS, ("load", "f8", (3,)), ("region", "i8")]
    rows = np.array([("a.mar", START, [1.0, 2.5], [1, 2, 3], 7)], fields)
    ((_, found),) = read_items(save_one(rows))
    expected = {"dynamic_feat": [[1.0, 2.0, 3.0]], "cat": [7], "names": ["load", "region"]}
    assert found == {"start": START, "target": [1.0, 2.5], **expected}


TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=8)
NUMBERS = drawn.arrays(
    st.sampled_from([np.float32, np.float64, np.int32, np.int64]),
    st.tuples(st.integers(1, 4), st.integers(0, 5)),
    elements={"min_value": -1000, "max_value": 1000},
)


@given(NUMBERS, st.lists(TEXTS, min_size=4, max_size=4), st.booleans(), st.sampled_from(["U", "S"]))
def test_files_and_arrow_say_the_same(numbers: Any, models: list[str], is_fortran: bool, kind: str) -> None:
    """Whatever the names, types, shapes and orders: a .npy, an .npz and an Arrow table are the same rows."""
    pytest.importorskip("pyarrow")
    from tests.server.front.columns.tables import read_items as read_arrow_items  # noqa: PLC0415 -- an extra
    from tests.server.front.columns.tables import write_table  # noqa: PLC0415

    names = models[: len(numbers)]
    given_names = np.array(names) if kind == "U" else np.array([name.encode() for name in names])
    fields = [("model", given_names.dtype), ("start", "U19"), ("target", numbers.dtype, numbers.shape[1:])]
    rows = np.zeros(len(names), fields)
    rows["model"], rows["start"], rows["target"] = given_names, START, numbers
    order = np.asfortranarray if is_fortran else np.ascontiguousarray
    members = {"model": given_names, "start": np.array(START), "target": order(numbers)}
    table = write_table({"model": names, "start": [START] * len(names), "target": list(numbers)})
    expected = [
        (each[0], json.loads(each[1])) if isinstance(each, tuple) else str(each) for each in read_arrow_items(table)
    ]
    for body in (save_one(rows), save_all(members)):
        assert [each if isinstance(each, tuple) else str(each) for each in read_items(body)] == expected


@pytest.mark.parametrize("kind", ["U", "S"])
@pytest.mark.parametrize("letter", ["m", "ü"])
def test_texts_of_many_rows_are_their_own(kind: str, letter: str) -> None:
    """More rows than are read by one look, of names of several lengths, some of them empty."""
    names = [letter * (i % 7) + f"{i}" if i % 5 else "" for i in range(2000)]
    given_names = np.array(names) if kind == "U" else np.array([name.encode() for name in names])
    table = finish_slices(read_npy(save_all({**MEMBERS, "model": given_names, "target": np.zeros((2000, 1))})))
    assert table.texts["model"] == [name or None for name in names]


def test_texts_of_no_width_are_none() -> None:
    """A type that numpy knows, and has no character for."""
    file = io.BytesIO(save_all())
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("item_id.npy", save_one(np.zeros(2, "U1")).replace(b"<U1", b"<U0")[:-8])
    assert read_table(file.getvalue()).texts["item_id"] == [None, None]


def test_a_row_that_is_wrong_is_refused_alone() -> None:
    """Empty and bad names, and a start that is no time: errors of their rows."""
    rows = np.array([("a.mar", START, [1.0, 2.0]), ("", START, [1.0, 2.0]), ("../x", START, [1.0, 2.0]),
                     ("d.mar", "NaT", [1.0, 2.0])], FIELDS)  # fmt: skip
    good, *wrong = read_items(save_one(rows))
    assert good[0] == "a.mar"
    assert [each.detail.field for each in wrong] == ["model", "model", "start"]
    assert all("max_body_bytes" in str(each) for each in read_items(save_one(rows[:1]), 10))


def zip_of(members: Mapping[str, bytes], **options: Any) -> bytes:
    """Bytes as members of a zip archive."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", **options) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return file.getvalue()


def with_header(text: str, data: bytes = b"") -> bytes:
    """A file with such a header."""
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode() + data


def make_bomb() -> bytes:
    """Many megabytes of zeros in some kilobytes."""
    file = io.BytesIO()
    np.savez_compressed(file, **{**MEMBERS, "target": np.zeros((2, 1_000_000))})
    return file.getvalue()


def cut_body(body: bytes, at: int) -> bytes:
    """The first bytes of a file."""
    return body[:at]


HOSTILE: Sequence[tuple[Callable[[], bytes], str]] = [
    (lambda: b"", "neither a .npy nor"),
    (lambda: pickle.dumps([1.0]), "without pickles"),
    (lambda: save_one(np.array([("a.mar", [1.0])], object)), "objects are pickled"),
    (lambda: save_all({**MEMBERS, "model": MODELS.astype(object)}), "member 'model'.*objects are pickled"),
    (lambda: save_all({**MEMBERS, "target": np.array([[1.0], [2.0, 3.0]], object)}), "never read"),
    (lambda: save_one(np.array([("a.mar", START, None)], [*FIELDS[:2], ("target", object)])), "'target' is of objects"),
    (lambda: b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**31), "longer than the file"),
    (lambda: with_header("{" + " " * MOST_HEADER), "a header of"),
    (lambda: b"\x93NUMPY\x07\x00" + bytes(64), "version 7"),
    (lambda: b"\x93NUMPY", "does not begin"),
    (lambda: cut_body(save_one(ROWS), 40), "longer than the file"),
    (lambda: cut_body(save_one(ROWS), -1), "bytes of numbers, and"),
    (lambda: save_one(ROWS) + b"x", "bytes of numbers, and"),
    (lambda: cut_body(save_all(), -1), "ends early"),
    (lambda: save_all() + b"x", "ends early"),
    (lambda: cut_body(save_all(), 60), "ends early"),
    (make_bomb, "np.savez: HTTP has Content-Encoding"),
    (lambda: zip_of({"model.npy": bytes(10**6)}, compression=zipfile.ZIP_DEFLATED), "Content-Encoding"),
    (lambda: zip_of({f"c{i}.npy": b"" for i in range(100)}), "100 members, 66 are the most"),
    (lambda: zip_of({"readme.txt": b""}), "is no .npy file"),
    (lambda: zip_of({"x" * 101 + ".npy": save_one(MODELS)}), "longer than 100"),
    (lambda: save_one(lay_rows([*FIELDS[:2], ("target", ">f8", (2,))])), r"'target' is big-endian.*newbyteorder"),
    (lambda: save_all({**MEMBERS, "model": MODELS.astype(">U5")}), "member 'model'.*big-endian"),
    (lambda: save_one(TARGET), "has no rows with fields"),
    (lambda: save_one(ROWS[0]), "has no rows with fields"),
    (lambda: save_one(ROWS.reshape(1, 2)), "has no rows with fields"),
    (lambda: save_all({"rows": ROWS}), "send that array alone"),
    (lambda: save_all({**MEMBERS, "target": TARGET[:1]}), "'target' has 1 rows, 'model' has 2"),
    (lambda: save_all({**MEMBERS, "load": TARGET[0]}), r"'load' is of float64; a series is \[rows, numbers\]"),
    (lambda: save_all({**MEMBERS, "load": TARGET[None]}), "a series of each row"),
    (lambda: save_all({**MEMBERS, "load": TARGET.astype(np.float16)}), "float16"),
    (lambda: save_all({**MEMBERS, "load": TARGET.astype(np.complex64)}), "complex64"),
    (lambda: save_all({**MEMBERS, "load": TARGET > 1}), "bool"),
    (lambda: save_all({**MEMBERS, "note": MODELS}), "only model, start, item_id are texts"),
    (lambda: save_all({**MEMBERS, "seed": np.array(1)}), "'seed' is one value; only start and configuration"),
    (lambda: save_all({**MEMBERS, "start": np.array(1)}), "'start' is one value"),
    (lambda: save_all({**MEMBERS, "configuration": np.datetime64(START)}), "configuration is a text"),
    (lambda: save_all({**MEMBERS, "model": TARGET}), "'model' is of 2 of float64 a row, and must be of texts"),
    (lambda: save_all({**MEMBERS, "target": np.array([1, 2])}), "'target' is of int64, and must be"),
    (lambda: save_all({**MEMBERS, "start": np.datetime64("2026")}), r"datetime64\[Y\]; send it as datetime64\[s\]"),
    (lambda: save_all({**MEMBERS, "start": np.datetime64("2026-01-01T00:00:00.5")}), "a fraction of a second"),
    (lambda: save_all({**MEMBERS, "start": np.datetime64(2**60, "s")}), "years 1 to 9999"),
    (lambda: save_all({**MEMBERS, "model": np.array([b"\xff", b"a"])}), "'model' is not UTF-8"),
    (lambda: save_all({"target": TARGET, "start": np.array(START)}), "model: the table has no such column"),
    (lambda: save_all({"model": MODELS, "start": np.array(START)}), "target: the table has no such column"),
    (lambda: save_all({"model": MODELS, "target": TARGET}), "start: the table has no such column.*npz"),
    (lambda: save_all({"start": np.array(START)}), "0 columns"),
    (lambda: save_one(np.zeros(1, [(f"c{i}", "i8") for i in range(65)])), "65 columns"),
    (lambda: save_one(ROWS[:0]), "1 to 10000 rows, not 0"),
    (lambda: save_one(np.zeros(MAX_ITEMS + 1, FIELDS)), f"1 to {MAX_ITEMS} rows"),
    (lambda: save_one(np.zeros(1, [*FIELDS[:2], ("target", "f8", (2, 3))])), "a row has one series"),
    (lambda: save_one(np.zeros(1, [*FIELDS, ("more", [("x", "f8")])])), "has fields of its own"),
    (lambda: save_one(np.zeros(1, [*FIELDS, (("title", "more"), "f8")])), "a title beside it"),
    (lambda: save_one(np.zeros(1, [*FIELDS[:2], ("target", "i8", (MOST_INTS + 1,))])), "whole numbers"),
    (lambda: save_all({**MEMBERS, "target": np.zeros((2, MOST_GATHERED + 1), np.float32, "F")}), "ascontiguousarray"),
    (lambda: with_header("{'descr': '<f8', 'fortran_order': False, 'shape': (2,), 'more': 1}"), "other keys"),
    (lambda: with_header("{'descr': '<f8', 'fortran_order': 2, 'shape': (2,)}"), "neither True nor False"),
    (lambda: with_header("{'descr': '<f8', 'fortran_order': False, 'shape': (-2,)}"), "at '-2"),
    (lambda: with_header("{'descr': '<f8', 'fortran_order': False, 'shape': (" + "9" * 400 + ",)}"), "at '9"),
    (lambda: with_header("{'descr': '<f8', 'fortran_order': False, 'shape': (" + "9" * 15 + "," + "9" * 15 + ")}"),
     "no rows with fields"),
    (lambda: with_header("{'descr': [('model', '<U9')], 'fortran_order': False, 'shape': (" + "9" * 15 + ",)}"),
     "bytes of numbers"),
    (lambda: with_header("[" * 1000), "too many of them"),
    (lambda: with_header("{'descr': __import__('os').abort()}"), "at .__import__"),
    (lambda: with_header("{'descr': [('', '|V4')], 'fortran_order': False, 'shape': (1,)}", bytes(4)), "no rows with"),
    (lambda: with_header("{'descr': [], 'fortran_order': False, 'shape': (1,)}"), "names no type"),
    (lambda: with_header("{'descr': [('', '<f8')], 'fortran_order': False, 'shape': (1,)}"), "has no name"),
    (lambda: with_header("{'descr': '<q', 'fortran_order': False, 'shape': (1,)} 1"), "more than one value"),
    (lambda: with_header("{'descr': '<M8[25s]', 'fortran_order': False, 'shape': (1,)}"), "no rows with fields"),
    (lambda: with_header("{'descr': 'float', 'fortran_order': False, 'shape': (1,)}"), "not known"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "says"), HOSTILE, ids=[says[:40] for _, says in HOSTILE])
def test_files_that_are_no_call(make: Callable[[], bytes], says: str) -> None:
    """Pickles, objects, huge headers, cut files, bombs, wrong lengths and types: each says what to send instead."""
    with pytest.raises(Refused) as caught:
        read_table(make())
    assert re.search(says, f"{caught.value.detail.field}: {caught.value}")


def test_no_member_is_read_twice() -> None:
    """An entry of the directory that leads to the bytes of another is refused before they are spent again."""
    body = bytearray(save_all({"model": MODELS, "aaaaa": np.zeros((2, 1000)), "bbbbb": np.zeros((2, 1000))}))
    entries = [at for at in range(len(body)) if body[at : at + 4] == b"PK\x01\x02"]
    for entry in entries:
        body[entry + 42 : entry + 46] = body[entries[1] + 42 : entries[1] + 46]
        body[entry + 20 : entry + 28] = body[entries[1] + 20 : entries[1] + 28]
    with pytest.raises(Refused, match="lie on each other"):
        read_table(bytes(body))


@pytest.mark.slow
def test_hostile_files_are_refused_or_read_within_bounds() -> None:
    """Files that were cut, changed and spliced: refused or read, no other exception, and memory of a few bodies."""
    rng = random.Random(7)
    members = {**MEMBERS, "load": np.asfortranarray([[1, 2], [3, 4]]), "region": np.array([1, 3])}
    bodies = [save_one(ROWS), save_all(members), save_all({**MEMBERS, "start": np.array([START] * 2, "M8[us]")})]
    outcomes, unexpected = {True: 0, False: 0}, 0
    tracemalloc.start()
    try:
        for _ in range(6000):
            body = bytearray(rng.choice(bodies))
            for _ in range(rng.randrange(1, 4)):
                at = rng.randrange(len(body))
                new = rng.choice((b"\xff", b"\0" * 4, b"9" * 8, rng.randbytes(4), b"(", b"'", b"O", b"\xff" * 8))
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

"""The reader of arrays and the reader of cells: one answer for every file, and arrays for most files."""

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from handlers.training import time_series
from handlers.training.stamps import FileRules
from handlers.training.time_series import SeriesInvalid, read_csv

pytest.importorskip("pyarrow", reason="the extra fleetcast[parquet] is not installed")

DAY = [f"2024-01-01 {hour:02}:00" for hour in range(6)]


def make_text(*cells: str, header: str = "t,p,q", end: str = "\n") -> str:
    """Six hours of two columns; `cells` replace the first rows after the stamp."""
    rows = [*cells, *(f"{i},{i * 1.5}" for i in range(len(cells), len(DAY)))]
    return end.join([header, *(f"{stamp},{row}" for stamp, row in zip(DAY, rows, strict=True))]) + end


ITEMS = make_text("1,a", "2,a", "3,b", "4,a", "5,a", "6,a", header="t,p,item_id")
TEXTS = {
    "plain": make_text(),
    "missing values of all kinds": make_text("1,", "nan,NaN", "-,NA", "n/e,null", "None,N/A"),
    "numbers of all kinds": make_text("+1,1e3", "-0.5,.5", "1.,1E-3", " 2 ,3 "),
    "a decimal comma": make_text('"1,5",2'),
    "underscores": make_text("1_000,2"),
    "infinity": make_text("inf,2"),
    "too large": make_text("1e400,2"),
    "words": make_text("1,2", "x,3"),
    "a cell too many": make_text("1,2", "1,2,3"),
    "a cell too few": make_text("1,2", "1"),
    "a blank line": make_text("1,2\n", "3,4"),
    "a blank line at the end": make_text() + "\n",
    "a blank line first": "\n" + make_text(),
    "quotes": make_text('"1",2', '3,"4"'),
    "a quoted header": make_text(header='t," p",q'),
    "a header of two lines": make_text(header='t,p,"q\nrest"'),
    "a byte order mark": "\ufeff" + make_text(),
    "windows": make_text(end="\r\n"),
    "names twice": make_text(header="t,p,p"),
    "no rows": "t,p,q\n",
    "nothing": "",
    "a stamp that is none": make_text().replace(DAY[3], "soon"),
    "a stamp twice": make_text().replace(DAY[3], DAY[2]),
    "a row missing": "".join(line for i, line in enumerate(make_text().splitlines(keepends=True)) if i != 3),
    "several items": ITEMS,
    "one item": ITEMS.replace(",b", ",a"),
}


def read_both(path: Path, monkeypatch: pytest.MonkeyPatch, **more: Any) -> list[Any]:
    """What each reader makes of a file: values, or the words of a refusal."""
    found = list[Any]()
    for quick in (True, False):
        with monkeypatch.context() as patched:
            if not quick:
                patched.setattr(time_series, "read_columns_quickly", lambda *_: None)
            try:
                series = read_csv(path, "t", ["p"], **more)
            except SeriesInvalid as error:
                found.append(str(error))
            else:
                found.append([(each.start, each.step, each.notes, each.values.tolist()) for each in series])
    return found


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_both_readers_say_the_same(text: str, packed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same numbers, or the same line of the same fault."""
    path = tmp_path / ("p.csv.gz" if packed else "p.csv")
    path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    quick, slow = read_both(path, monkeypatch)
    assert repr(quick) == repr(slow), "NaN is not equal to itself"


def test_both_readers_read_one_of_several_items(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows of the item, and their lines in what is said of them."""
    path = tmp_path / "p.csv"
    path.write_text(ITEMS)
    for item in ("a", "b", "c"):
        quick, slow = read_both(path, monkeypatch, rules=FileRules(item=("item_id", item)))
        assert quick == slow
        if item == "a":
            assert "line 5: 2024-01-01 03:00:00" in quick


@pytest.mark.parametrize("damage", [b"\xff\xfe", b"\x00"])
def test_both_readers_refuse_what_is_no_text(damage: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the same words, plain and packed; a packed file that is cut off too."""
    path, packed = tmp_path / "p.csv", tmp_path / "p.csv.gz"
    path.write_bytes(make_text().encode().replace(b"3,4.5", b"3," + damage))
    whole = gzip.compress(path.read_bytes())
    for broken in (whole, whole[:-9], b"no gzip"):
        packed.write_bytes(broken)
        quick, slow = read_both(packed, monkeypatch)
        assert quick == slow
    quick, slow = read_both(path, monkeypatch)
    assert quick == slow


def test_an_ordinary_file_is_read_as_arrays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No cell is parsed by itself, also over many blocks of the file; the values are the file's."""
    monkeypatch.setattr("handlers.training.quick_columns.BLOCK_BYTES", 1000)
    monkeypatch.setattr(time_series, "_parse_number", lambda *_: pytest.fail("read cell by cell"))
    values = np.random.default_rng(0).normal(50, 20, 500).round(2)
    values[7] = np.nan
    stamps = np.datetime64("2024-01-01T00:00") + np.arange(500) * np.timedelta64(1, "h")
    texts = ["" if np.isnan(value) else f"{value}" for value in values]
    rows = [f"{str(stamp).replace('T', ' ')},{text},9" for stamp, text in zip(stamps, texts, strict=True)]
    path = tmp_path / "p.csv.gz"
    path.write_bytes(gzip.compress("\n".join(["t,p,q", *rows]).encode()))
    p, q = read_csv(path, "t", ["p", "q"])
    assert np.array_equal(p.values, values, equal_nan=True)
    assert (q.values == 9).all()

"""Traces are read as they were written, invalid rows are refused with their place, and memory is bounded."""

import gzip
import re
import tracemalloc
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.driver import trace
from loadtest.driver.profiles import Profile, Replay
from loadtest.driver.run_result import CACHE, LOST, NO_ANSWER, Run
from loadtest.driver.trace import Trace, TraceInvalid, make_trace, read_chunks, read_trace, write_trace
from model_store.names import ModelName
from server.contract import ACCESS_LOG_OUTCOMES

HEADER = "time,model,bytes,outcome\n"
NAMES = st.text(st.characters(exclude_categories=["C", "Z"], exclude_characters="\\/."), min_size=1, max_size=12)
ROWS = st.lists(
    st.tuples(
        st.integers(0, 2 * 10**15),  # microseconds, up to the year 2033
        NAMES | st.sampled_from(['a,b"c', '"x"', "x", "eu/at/day ahead.mar"]),
        st.integers(0, 10**18 - 1),
        st.integers(0, len(ACCESS_LOG_OUTCOMES) - 1),
    ),
    max_size=30,
)


def a_trace(rows: list[tuple[int, str, int, int]]) -> Trace:
    """Rows of microseconds, name, size and outcome; names in alphabetical order."""
    names = sorted({name for _, name, _, _ in rows})
    time = np.array([micros / 1e6 for micros, *_ in rows], np.float64)
    model = np.array([names.index(name) for _, name, _, _ in rows], np.int32)
    size = np.array([size for _, _, size, _ in rows], np.int64)
    return Trace(time, model, size, np.array([row[3] for row in rows], np.uint8), [ModelName(name) for name in names])


def rows_of(found: Trace) -> list[tuple[int, str, int, int]]:
    """What `a_trace` takes."""
    micros = (found.time * 1e6).round().astype(np.int64).tolist()
    names = [found.names[model] for model in found.model.tolist()]
    return list(zip(micros, names, found.size.tolist(), found.outcome.tolist(), strict=True))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For tests that write one file many times."""
    return tmp_path_factory.mktemp("traces")


@pytest.mark.slow
@given(first=ROWS, second=ROWS, name=st.sampled_from(["load.csv", "load.csv.gz"]))
def test_what_was_written_is_read(folder: Path, first: list, second: list, name: str) -> None:  # type: ignore[type-arg]
    """Whatever the rows, plain and gzipped, also after an append: all of them, sorted by time and else as they came."""
    path = folder / name
    write_trace(path, a_trace(first))
    write_trace(path, a_trace(second), append=True)
    found = read_trace(path)
    assert rows_of(found) == sorted(first + second, key=lambda row: row[0])
    assert len(set(found.names)) == len(found.names)


@pytest.mark.slow
@given(rows=ROWS)
def test_chunks_are_the_file(folder: Path, rows: list) -> None:  # type: ignore[type-arg]
    """In the order of the file, in pieces of bounded size, with names that only grow."""
    path = folder / "chunks.csv"
    write_trace(path, a_trace(rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trace, "CHUNK", 7)
        chunks = list(read_chunks(path))
    assert [row for chunk in chunks for row in rows_of(chunk)] == rows
    assert [len(chunk.time) for chunk in chunks] == [7] * (len(rows) // 7) + [len(rows) % 7]


def test_the_file_is_what_the_format_says(tmp_path: Path) -> None:
    """Byte for byte: others write and read it too."""
    path = tmp_path / "load.csv"
    rows = [(1767225600000125, "au/nsw1/energy.mar", 70412, 1), (1767225600000250, 'a,"b"', 0, 5)]
    write_trace(path, a_trace(rows))
    written = HEADER + '1767225600.000125,au/nsw1/energy.mar,70412,hit\n1767225600.000250,"a,""b""",0,lost\n'
    assert path.read_text() == written
    write_trace(tmp_path / "load.csv.gz", a_trace(rows))
    assert gzip.decompress((tmp_path / "load.csv.gz").read_bytes()).decode() == written


def test_what_others_write_is_read(tmp_path: Path) -> None:
    """Numbers as pandas writes them, and names quoted without need: `"x"` and `x` are one model."""
    path = tmp_path / "load.csv"
    path.write_text(HEADER + '5e-06,"x",1,hit\n0.30000000000000004,x,1,miss\n7,"""x""",1,hit\n')
    found = read_trace(path)
    assert found.time.tolist() == [5e-06, 0.30000000000000004, 7.0]
    assert (found.model.tolist(), found.names) == ([0, 0, 1], ["x", '"x"'])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "line 1: a trace begins with the line time,model,bytes,outcome"),
        ("time;model;bytes;outcome\n", "line 1: a trace begins"),
        ("\ufeff" + HEADER, "line 1: a trace begins"),
        (HEADER + "1,a,2,hit\n" + HEADER, "line 3: the header again"),
        (HEADER + "1,a,2,hit\n1.5,a,2,mi", "line 3: not a whole line, its writer was stopped"),
        (HEADER + "1,a,2,hit", "line 2: not a whole line"),
        (HEADER + "\n", "line 2: '\\n' is not time,model,bytes,outcome"),
        (HEADER + "1,a,2,hit\r\n", "line 2: '1,a,2,hit\\r\\n' is not"),
        (HEADER + "1,a,2\n", "is not"),
        (HEADER + "1,a,2,hit,5\n", "is not"),
        (HEADER + "1,a,b,2,hit\n", "name, quoted if it has commas or quotes"),
        (HEADER + '1,"a,2,hit\n2,b",2,hit\n', "line 2: "),
        (HEADER + "-1,a,2,hit\n", "is not"),
        (HEADER + "nan,a,2,hit\n", "is not"),
        (HEADER + "1e300,a,2,hit\n", "is not"),
        (HEADER + "\u0661,a,2,hit\n", "is not"),
        (HEADER + "1767225600000,a,2,hit\n", "seconds in digits, at most 11 before a point"),
        (HEADER + "1,a,-2,hit\n", "is not"),
        (HEADER + "1,a,1_0,hit\n", "is not"),
        (HEADER + "1,a,9999999999999999999,hit\n", "is not"),
        (HEADER + "1,a,2,HIT\n", "one of answered, hit, miss, coalesced, refused, lost"),
        (HEADER + "1,,2,hit\n", "line 2: the model name is empty"),
        (HEADER + '1,"",2,hit\n', "line 2: the model name is empty"),
        (HEADER + "1,a,2,hit\n1,../a,2,hit\n", "line 3: the model name '../a' has the segment '..'"),
        (HEADER + "1,a\rX-Evil: 1,2,hit\n", "line 2: the model name 'a\\rX-Evil: 1' has a control"),
        (HEADER + f"1,{'a' * 1025},2,hit\n", "line 2: the model name has 1025 characters"),
        (HEADER + f"1,{'a' * 9000},2,hit\n", "line 2: longer than 8192 bytes"),
    ],
)
@pytest.mark.parametrize("name", ["bad.csv", "bad.csv.gz"])
def test_what_is_not_understood_is_refused(text: str, why: str, name: str, tmp_path: Path) -> None:
    """Nothing is skipped or guessed: the message names the file and the line, and says what is wrong there."""
    path = tmp_path / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    with pytest.raises(TraceInvalid, match=re.escape(why)) as refused:
        read_trace(path)
    assert str(refused.value).startswith(f"{path}, line ")


@pytest.mark.slow
@given(st.binary(max_size=200) | st.binary(max_size=100).map(lambda tail: HEADER.encode() + b"1,a,2,hit\n" + tail))
def test_any_bytes_are_a_trace_or_refused(folder: Path, data: bytes) -> None:
    """No other error than TraceInvalid, plain or gzipped."""
    for number, content in enumerate((data, gzip.compress(data), b"\x1f\x8b" + data)):
        path = folder / f"any-{number}"
        path.write_bytes(content)
        with suppress(TraceInvalid):
            read_trace(path)


def test_gzip_that_is_cut_off_is_said(tmp_path: Path) -> None:
    """A writer that was killed: how much of it can be read, and how to have that; the same for damage."""
    path = tmp_path / "load.csv.gz"
    whole = gzip.compress((HEADER + "1,a,2,hit\n").encode())
    path.write_bytes(whole + whole[: len(whole) // 2])
    with pytest.raises(TraceInvalid, match=r"load.csv.gz: the gzip data is cut off or damaged \(Compressed file ended"):
        read_trace(path)
    path.write_bytes(whole[:-5] + b"\0" * 5)
    with pytest.raises(TraceInvalid, match=r"CRC check failed .*; `gzip -dc` writes out what is whole of it"):
        read_trace(path)


@pytest.mark.slow
@pytest.mark.parametrize("content", [b"1,a,2,hit\n", b"a", b"\n"], ids=["rows", "one line", "empty lines"])
def test_bombs_are_bounded(content: bytes, tmp_path: Path) -> None:
    """Some kilobytes that unzip to 200 MB are refused with little memory: too many rows, too long a line, no row."""
    path = tmp_path / "bomb.csv.gz"
    block = gzip.compress(content * (1_000_000 // len(content)))
    path.write_bytes(gzip.compress(HEADER.encode()) + 200 * block)
    assert path.stat().st_size < 1_000_000
    tracemalloc.start()
    try:
        with pytest.raises(TraceInvalid, match="bomb"):
            read_trace(path, max_rows=1000)
        assert tracemalloc.get_traced_memory()[1] < 40_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.slow
def test_rows_are_not_objects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading many rows needs the arrays and one chunk of objects, not a hundred bytes a row."""
    monkeypatch.setattr(trace, "CHUNK", 2048)
    path, rows = tmp_path / "load.csv", 30_000
    time = np.arange(rows) / 1000
    written = Trace(time, np.zeros(rows, np.int32), np.ones(rows, np.int64), np.ones(rows, np.uint8), [ModelName("a")])
    write_trace(path, written)
    tracemalloc.start()
    try:
        assert len(read_trace(path).time) == rows
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2 * 21 * rows + 200 * trace.CHUNK


def test_more_rows_or_models_than_allowed_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exactly as many are fine; with one more the message says the bound and the line."""
    path = tmp_path / "load.csv"
    path.write_text(HEADER + "".join(f"{i},model-{i},1,hit\n" for i in range(10)))
    assert len(read_trace(path, max_rows=10).time) == 10
    with pytest.raises(TraceInvalid, match=r"line 11: more than 9 rows; read a part of it, or allow more"):
        read_trace(path, max_rows=9)
    monkeypatch.setattr(trace, "MAX_NAMES", 10)
    assert len(read_trace(path).names) == 10
    monkeypatch.setattr(trace, "MAX_NAMES", 9)
    with pytest.raises(TraceInvalid, match=r"line 11: more than 9 models"):
        read_trace(path)


@pytest.mark.parametrize("rows", [[(-1, "a", 1, 1)], [(10**17, "a", 1, 1)], [(1, "a", -1, 1)]])
def test_what_could_not_be_read_is_not_written(rows: list[tuple[int, str, int, int]], tmp_path: Path) -> None:
    """Times before 0 or in milliseconds, negative sizes: refused before the file is touched."""
    with pytest.raises(ValueError, match="is not written: times are 0 to 1e"):
        write_trace(tmp_path / "load.csv", a_trace(rows))
    assert not (tmp_path / "load.csv").exists()


def test_a_run_becomes_a_trace_that_can_be_replayed(tmp_path: Path) -> None:
    """When each request was due, for whom, and what came of it; a replay asks for the same models at the same time."""
    schedule = Profile(9, 100.0).schedule(5.0)
    n = len(schedule.at)
    fates = [(200, CACHE.index(cache)) for cache in ("", "hit", "miss", "coalesced")]
    fates += [(503, 0), (404, 1), (LOST, 0), (NO_ANSWER, 0)]
    status, cache = (np.array(column) for column in zip(*(fates[i % len(fates)] for i in range(n)), strict=True))
    nan = np.full(n, np.nan)
    run = Run(schedule, nan, nan, nan, status, cache, 5.0, False, 0, [])
    names = [ModelName(f"eu/zone-{i}.mar") for i in range(9)]
    made = make_trace(run, names, sizes=[10 * i for i in range(9)], started=1767225600.0)
    write_trace(tmp_path / "run.csv.gz", made)
    found = read_trace(tmp_path / "run.csv.gz")
    assert repr(found) == f"<Trace of {n} requests for 9 models>"
    outcomes = ["answered", "hit", "miss", "coalesced", "refused", "refused", "lost", "lost"]
    assert [ACCESS_LOG_OUTCOMES[outcome] for outcome in found.outcome[:8].tolist()] == outcomes
    assert [found.names[i] for i in found.model.tolist()] == [names[i] for i in schedule.model.tolist()]
    assert found.size.tolist() == (10 * schedule.model).tolist()
    replayed = Replay(found.recording(), len(found.names)).schedule(60.0)
    assert replayed.at == pytest.approx(schedule.at - schedule.at[0], abs=2e-6)
    assert [found.names[i] for i in replayed.model.tolist()] == [names[i] for i in schedule.model.tolist()]


def test_a_trace_is_replayed_on_a_fleet_by_name() -> None:
    """Names decide, not the order in which they came; a model that the fleet lacks is refused by name."""
    made = a_trace([(5, "b", 1, 1), (6, "a", 1, 1), (9, "b", 1, 1)])
    assert made.recording().model.tolist() == [1, 0, 1]
    found = made.recording(["x", "b", "y", "a"])
    assert found.model.tolist() == [1, 3, 1]
    assert found.at == pytest.approx([0, 1e-6, 4e-6])
    assert a_trace([]).recording().seconds == 0.0
    with pytest.raises(ValueError, match="1 models of the trace are not in the fleet; the first is a"):
        made.recording(["b"])


def test_an_access_log_with_traces_is_a_trace(tmp_path: Path) -> None:
    """A server's rows end with the id of a trace, or with none; a replay needs neither. Each header has its rows."""
    path = tmp_path / "log.csv"
    path.write_text(f"{HEADER.rstrip()},trace_id\n1,a,2,hit,\n2,a,2,miss,{'0af7651916cd43dd' * 2}\n")
    assert read_trace(path).time.tolist() == [1.0, 2.0]
    for wrong in ("1,a,2,hit\n", "1,a,2,hit,x\n", "1,a,2,hit,,\n"):
        path.write_text(f"{HEADER.rstrip()},trace_id\n{wrong}")
        with pytest.raises(TraceInvalid, match="line 2"):
            read_trace(path)

"""The access log: its rows, its parts, and what a full disk, a crash and a second server do to it."""

import gzip
import resource
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.driver.trace import TraceInvalid, read_trace
from model_store.names import parse_model_name
from server import access_log as arrivals
from server.access_log import PARTS, AccessLog, ArrivalBuffer, Receipt, Row, list_log_parts, read_rows
from server.contract import ACCESS_LOG_HEADER as HEADER
from server.contract import ACCESS_LOG_OUTCOMES as OUTCOMES
from server.ipc.frames import CacheResult

BUDGET = 64 * 1024


def make_rows(first: int, count: int) -> str:
    """Rows of so many seconds."""
    return "".join(f"{second}.000000,au/nsw1.mar,70000,hit,\n" for second in range(first, first + count))


@pytest.fixture
def clock() -> Callable[[], float]:
    """Wall and monotonic clock, which stand still."""
    return lambda: 1000.0


def test_outcomes_are_numbered_as_on_the_wire() -> None:
    """A worker notes a cache result by its number in the frames, so both must have the same order."""
    assert {result.name.lower(): OUTCOMES[result] for result in CacheResult} == {
        "none": "answered",
        "hit": "hit",
        "miss": "miss",
        "coalesced": "coalesced",
    }


@given(st.lists(st.sampled_from(["a.mar", "au/nsw1.mar", 'a "b", c.mar', "\u4ef7,\u683c.mar"]), min_size=1, max_size=9))
def test_whatever_the_names_both_readers_read_them_back(names: list[str]) -> None:
    """Commas, quotes and other scripts survive; time is wall clock."""
    kept = ArrivalBuffer(wall=lambda: 1_000_000.0, now=lambda: 100.0)
    for i, name in enumerate(names):
        kept.note(parse_model_name(name), 100.0 + i, i, i % len(OUTCOMES))
    with tempfile.TemporaryDirectory() as folder:  # each case needs one
        log = AccessLog(Path(folder), BUDGET)
        log.write(kept.hand_over([]).rows)
        log.close()
        found = list(read_rows(Path(folder)))
        trace = read_trace(Path(folder))
    assert [row.model for row in found] == names == [trace.names[i] for i in trace.model]
    assert [row.time for row in found] == list(trace.time) == [1_000_000.0 + i for i in range(len(names))]
    assert [row.bytes for row in found] == list(trace.size) == list(range(len(names)))
    assert [row.outcome for row in found] == [OUTCOMES[i] for i in trace.outcome]


def test_a_worker_keeps_a_bounded_number_of_rows(monkeypatch: pytest.MonkeyPatch, clock: Callable[[], float]) -> None:
    """Where nobody takes them the newest are dropped and counted, once."""
    monkeypatch.setattr(arrivals, "MAX_CHARS", 2 * len("1000.000000,a.mar,1,hit,\n") + 1)
    kept = ArrivalBuffer(clock, clock)
    for i in range(5):
        kept.note("a.mar", i, 1, 1)
    taken = kept.hand_over([])
    assert (taken.rows.count("\n"), taken.number, taken.dropped) == (3, 3, 2)
    kept.note("a.mar", 5, 1, 1)
    assert kept.hand_over([]) == (taken.rows, 3, 3, Receipt(taken.receipt.buffer, 3, 3)), "those that wait count too"
    assert kept.hand_over([taken.receipt])[:3] == ("", 0, 1)
    kept.note("a.mar", 6, 1, 1)
    assert kept.hand_over([Receipt(taken.receipt.buffer, 3, 3)])[:3] == ("6.000000,a.mar,1,hit,\n", 1, 0)


def test_rows_are_handed_over_until_their_receipt_comes(clock: Callable[[], float]) -> None:
    """The supervisor waits for no worker for long, and has nothing of an answer that comes too late. A question that it
    gave up may also come late, with a receipt of before: no row is then lost or handed over twice.
    """
    kept = ArrivalBuffer(clock, clock)
    log = list[str]()
    for i in range(3):
        kept.note(f"{i}.mar", i, 1, 1)
    first = kept.hand_over([])
    log.append(first.rows)
    kept.note("3.mar", 3, 1, 1)
    late = kept.hand_over([first.receipt])
    assert late.number == 1
    assert kept.hand_over([Receipt("another's", 4, 0), first.receipt]) == late, "it has not arrived"
    kept.note("4.mar", 4, 1, 1)
    second = kept.hand_over([first.receipt])
    log.append(second.rows)
    kept.note("5.mar", 5, 1, 1)
    assert kept.hand_over([first.receipt]).number == 3, "asked before the second one, and comes after it"
    third = kept.hand_over([second.receipt])
    log.append(third.rows)
    assert kept.hand_over([third.receipt]).number == 0
    assert kept.hand_over([first.receipt]).number == 0, "what has arrived once is gone"
    assert [row.partition(",")[2] for row in "".join(log).splitlines()] == [f"{i}.mar,1,hit," for i in range(6)]


@pytest.mark.slow
def test_parts_are_zipped_bounded_and_read_in_order(tmp_path: Path) -> None:
    """Far more rows than fit: all parts but the newest are gzipped, the oldest are gone, the rest is in order."""
    log = AccessLog(tmp_path, BUDGET)
    for second in range(0, 60_000, 200):
        log.write(make_rows(second, 200))
        assert log.used_bytes() <= BUDGET
    log.write(make_rows(60_000, 1))
    log.close()
    *old, newest = list_log_parts(tmp_path)
    assert len(old) > PARTS, "zipped ones are small"
    assert all(part.name.endswith(".csv.gz") for part in old)
    assert newest.suffix == ".csv"
    times = [row.time for row in read_rows(tmp_path)]
    assert times == [float(second) for second in range(60_001 - len(times), 60_001)]
    assert list(read_trace(tmp_path).time) == times


def test_the_next_server_goes_on_in_a_new_part_after_a_crash(tmp_path: Path) -> None:
    """What a crash has torn is cut off, what it left is zipped, and its numbers are not used again."""
    log = AccessLog(tmp_path, BUDGET)
    log.write(make_rows(0, 5))
    assert log._part is not None
    for file in (log._lock, log._part):
        file.close()  # the process is gone
    torn = tmp_path / "arrivals-00000001.csv"
    torn.write_text(torn.read_text() + "5.000000,au/ns")
    (tmp_path / "arrivals-00000000.tmp").write_bytes(gzip.compress(b"half")[:9])
    again = AccessLog(tmp_path, BUDGET)
    again.write(make_rows(5, 1))
    again.close()
    assert [part.name for part in list_log_parts(tmp_path)] == ["arrivals-00000001.csv.gz", "arrivals-00000002.csv"]
    assert [row.time for row in read_rows(tmp_path)] == [0, 1, 2, 3, 4, 5]


def test_a_server_without_requests_leaves_no_part(tmp_path: Path) -> None:
    """Restarts do not fill the folder, and reading an empty one says what is missing."""
    AccessLog(tmp_path, BUDGET).close()
    assert list_log_parts(tmp_path) == []
    with pytest.raises(TraceInvalid, match="has no files"):
        read_trace(tmp_path)


def test_two_servers_do_not_write_one_log(tmp_path: Path) -> None:
    """The second is refused with the folder's name, and may when the first has ended."""
    first = AccessLog(tmp_path, BUDGET)
    with pytest.raises(OSError, match=f"another server writes its access log into {tmp_path}"):
        AccessLog(tmp_path, BUDGET)
    first.close()
    AccessLog(tmp_path, BUDGET).close()


@contextmanager
def full_disk(largest: int) -> Iterator[None]:
    """No file of this process can be longer: writes end short there, then fail, as on a disk without room."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_costs_rows_and_leaves_a_whole_log(tmp_path: Path) -> None:
    """Half of the rows fit: the write fails, nothing of it stays, and once there is room the log goes on."""
    log = AccessLog(tmp_path, BUDGET)
    log.write(make_rows(0, 3))
    with full_disk(log.used_bytes() + 50), pytest.raises(OSError, match="File too large"):
        log.write(make_rows(3, 3))
    log.write(make_rows(9, 1))
    log.close()
    assert [row.time for row in read_rows(tmp_path)] == [0, 1, 2, 9]


def test_a_disk_too_full_for_the_next_part_is_tried_again(tmp_path: Path) -> None:
    """Not even its header fits: no torn part stays, and the log goes on with whole ones; the old part is not zipped."""
    log = AccessLog(tmp_path, BUDGET)
    log.write(make_rows(0, 9))
    with full_disk(10):
        log._rotate()
        with pytest.raises(OSError, match="File too large"):
            log.write(make_rows(900, 1))
    assert [part.name for part in list_log_parts(tmp_path)] == ["arrivals-00000001.csv"]
    log.write(make_rows(901, 1))
    log.close()
    assert [part.name for part in list_log_parts(tmp_path)] == ["arrivals-00000001.csv", "arrivals-00000002.csv"]
    assert not list(tmp_path.glob("*.tmp"))
    assert list(read_trace(tmp_path).time)[-1] == 901


def test_a_line_that_is_no_row_is_said_with_its_place(tmp_path: Path) -> None:
    """File, line, and what a row looks like."""
    part = tmp_path / "log.csv"
    part.write_text(HEADER + "1,a.mar,x,hit,\n")
    with pytest.raises(ValueError, match=r"log.csv, line 2: .* is not time,model,bytes,outcome"):
        list(read_rows(part))
    part.write_text("something else\n")
    with pytest.raises(ValueError, match="line 1: an access log begins with"):
        list(read_rows(part))


def test_a_sampled_request_has_the_id_of_its_trace(tmp_path: Path) -> None:
    """Others have none; a log of before has no such column, and a row of the other kind is none."""
    kept = ArrivalBuffer(wall=lambda: 1_000_000.0, now=lambda: 100.0)
    kept.note("a", 100.0, 5, 1, "0af7651916cd43dd8448eb211c80319c")
    kept.note("a", 101.0, 5, 1)
    log = AccessLog(tmp_path, BUDGET)
    log.write(kept.hand_over([]).rows)
    log.close()
    assert [row.trace_id for row in read_rows(tmp_path)] == ["0af7651916cd43dd8448eb211c80319c", ""]
    old = tmp_path / "old.csv"
    old.write_text("time,model,bytes,outcome\n1.0,a,5,hit\n")
    assert list(read_rows(old)) == [Row(1.0, "a", 5, "hit")]
    for header, row in (("", "1.0,a,5,hit,x"), (",trace_id", "1.0,a,5,hit"), (",trace_id", "1.0,a,5,hit,x,y")):
        old.write_text(f"time,model,bytes,outcome{header}\n{row}\n")
        with pytest.raises(ValueError, match="line 2"):
            list(read_rows(old))

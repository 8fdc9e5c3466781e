"""Logging: a separate thread writes lines; a reader that stops or goes loses lines and has no other effect."""

import json
import logging
import os
import subprocess
import sys
import threading
from typing import Any

import pytest
import structlog

from server.logs import BURST, MAX_BYTES, MAX_LINE_BYTES, MAX_LINES, PER_SECOND, LineWriter, RateLimit


def drain(read: int, writer: LineWriter) -> None:
    """Read until the writer has written all of its lines."""
    os.set_blocking(read, False)
    while not writer.flush(0.01):
        try:
            os.read(read, 1 << 16)
        except BlockingIOError:
            pass


@pytest.fixture
def pipe() -> Any:
    """Both ends of a pipe, closed in the end."""
    read, write = os.pipe()
    yield read, write
    for descriptor in (read, write):
        try:
            os.close(descriptor)
        except OSError:
            pass


def test_lines_arrive_in_order(pipe: tuple[int, int]) -> None:
    """What several threads write comes whole, each thread's lines in its order."""
    read, write = pipe
    writer = LineWriter(write)

    def write_200(k: int) -> None:
        for i in range(200):
            writer.write(f"{k} {i}")

    threads = [threading.Thread(target=write_200, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert writer.flush(60)
    lines = os.read(read, 1 << 20).decode().splitlines()
    assert sorted(lines) == sorted(f"{k} {i}" for k in range(4) for i in range(200))
    assert [line for line in lines if line[0] == "2"] == [f"2 {i}" for i in range(200)]
    assert writer.dropped == 0


def test_a_reader_that_stops_costs_lines_only(pipe: tuple[int, int]) -> None:
    """With the pipe full, `write` returns: the queue is bounded, the rest is counted; later lines flow again."""
    read, write = pipe
    writer = LineWriter(write)
    for _ in range(MAX_LINES + 100_000):
        writer.write("x" * 20)
    assert not writer.flush(0)
    assert writer.dropped >= 100_000 - (1 << 16)  # what the pipe itself holds
    drain(read, writer)
    writer.write("again")
    assert writer.flush(60)


@pytest.mark.slow
def test_the_queue_is_bounded_in_bytes(pipe: tuple[int, int]) -> None:
    """Long lines fill it sooner, and a line too long is cut."""
    read, write = pipe
    writer = LineWriter(write)
    lines = MAX_BYTES // MAX_LINE_BYTES + 20
    for _ in range(lines):
        writer.write("y" * (10 * MAX_LINE_BYTES))
    assert writer.dropped >= 15
    drain(read, writer)


def test_a_reader_that_has_gone_costs_lines_only(pipe: tuple[int, int]) -> None:
    """Every line is dropped and counted; nothing is raised."""
    read, write = pipe
    os.close(read)
    writer = LineWriter(write)
    for _ in range(10):
        writer.write("to nobody")
    assert writer.flush(60)
    assert writer.dropped == 10


def test_warnings_are_limited_by_kind() -> None:
    """A burst passes, then a few a second; the next one says how many were left out; other kinds and errors pass."""
    now = [0.0]
    limit = RateLimit(lambda: now[0])

    def is_passed(kind: str, method: str = "warning") -> dict[str, Any] | None:
        try:
            return dict(limit(None, method, {"event": kind}))
        except structlog.DropEvent:
            return None

    assert [is_passed("load_failed") for _ in range(BURST + 7)].count(None) == 7
    assert is_passed("load_failed", "error") == is_passed("load_failed", "info") == {"event": "load_failed"}
    assert is_passed("other") == {"event": "other"}
    now[0] = 1.0
    assert is_passed("load_failed") == {"event": "load_failed", "not_shown": 7}
    assert [is_passed("load_failed") for _ in range(10)].count(None) == 10 - int(PER_SECOND) + 1


@pytest.mark.slow
def test_a_process_writes_its_last_lines() -> None:
    """Lines of our own and of libraries, and a traceback, are on standard error when the process has ended."""
    code = """if True:
        import logging, structlog
        from server.logs import configure_logs
        configure_logs("info", "json", worker=3)
        structlog.get_logger().info("here", model="a.mar")
        logging.getLogger("uvicorn.error").warning("Invalid HTTP request received.")
        try:
            1 / 0
        except ZeroDivisionError:
            structlog.get_logger().exception("failed")
    """
    done = subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, check=True)
    here, library, failed = map(json.loads, done.stderr.splitlines())
    assert (here["event"], here["worker"], here["model"]) == ("here", 3, "a.mar")
    assert (library["library"], library["message"]) == ("uvicorn.error", "Invalid HTTP request received.")
    assert "ZeroDivisionError" in failed["exception"]
    assert logging.getLevelName(logging.WARNING) == library["level"].upper()

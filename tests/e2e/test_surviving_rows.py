"""A worker that is killed with many residents: the next one takes them back, without store and without disk."""

import mmap
import os
import re
import shutil
import signal
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from server.contract import SURVIVING_RESULTS, SURVIVING_ROWS
from tests.e2e.conftest import Serve
from tests.e2e.models import pack_fleet
from tests.e2e.server import Load, Server, upload
from tests.e2e.test_deaths import is_up
from tests.patience import wait_until
from tests.processes import list_descriptors
from tests.s3 import S3Server

pytestmark = pytest.mark.e2e

MODELS = 60


def test_a_killed_worker_leaves_its_rows_to_the_next(s3: S3Server, store: str, serve: Serve, tmp_path: Path) -> None:
    """Killed under load: every answer is right, the spare is the next worker, all are resident at once, nothing is
    fetched or read again. A row that somebody has changed is noticed after the next death, and alone loaded again.
    """
    models = pack_fleet("markets", MODELS)
    upload(s3, store, models)
    questions = [model.question(1) for model in models]
    with serve(disk_cache=tmp_path / "disk", revalidate_s=10_000, watch_store="off", spare_worker="on") as server:
        for question in questions:
            server.ask(question)
        gets = len(s3.seen("GET", ".mar"))
        shutil.rmtree(tmp_path / "disk")  # whatever is loaded from now on comes from the store
        wait_until(lambda: any(each["up"] for each in server.processes("spare")), "a spare waits")
        (spare,) = server.processes("spare")
        with Load(server, questions) as load:
            load.more(MODELS)
            kill_worker(server, 2)
            assert server.processes("worker")[0]["pid"] == spare["pid"]
            assert len(server.resident()) == MODELS
            assert count_surviving(server) == [MODELS, 0]
            assert all(map(is_closed_on_exec, list_rows(spare["pid"]))), "archives' code is executed, and gets none"
            load.more(MODELS)
        assert {outcome.problem for outcome in load.outcomes} <= {"", "503 ServiceUnavailable"}
        assert len(s3.seen("GET", ".mar")) == gets

        flip_a_bit(server)
        kill_worker(server, 3)
        assert {server.ask(question).cache for question in questions} == {"hit", "miss"}
        assert len(s3.seen("GET", ".mar")) == gets + 1
        server.await_said('"row_damaged"')
        assert count_surviving(server) == [2 * MODELS, 1]


def count_surviving(server: Server) -> list[float]:
    """Rows that were adopted and that were damaged, over all workers whose metrics were read before they died."""
    return [server.total(SURVIVING_ROWS.series, result=result) for result in SURVIVING_RESULTS]


def kill_worker(server: Server, incarnation: int) -> None:
    """Kill the worker, and wait until its next incarnation is up."""
    os.kill(server.processes("worker")[0]["pid"], signal.SIGKILL)
    wait_until(partial(is_up, server, "worker", 0, incarnation), "the next worker is up")


def list_rows(pid: int) -> list[Path]:
    """The process's descriptors of memory for rows."""
    return [link for link, target in list_descriptors(pid) if "fleetcast-rows-" in target]


def is_closed_on_exec(link: Path) -> bool:
    """Whether no program that the process executes has this descriptor."""
    (flags,) = re.findall(r"flags:\s*(\d+)", (link.parent.parent / "fdinfo" / link.name).read_text())
    return bool(int(flags, 8) & os.O_CLOEXEC)


def flip_a_bit(server: Server) -> None:
    """Flip a bit of a row in the memory that the supervisor holds: of the last number in it that is not zero."""
    (rows,) = list_rows(server.process.pid)
    with rows.open("r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
        data = np.frombuffer(memory, np.uint64)
        at = 8 * int(np.flatnonzero(data)[-1])
        del data
        memory[at] ^= 1

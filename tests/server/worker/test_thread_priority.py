"""Threads that load yield to those that answer; threads that run requests never inherit that."""

import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import TypeVar

import onnx
import pytest

from handlers.kinds import Target
from handlers.work import SessionLimits, WorkLimits
from model_store.archives.archive import Limits
from model_store.names import ModelName
from model_store.stores.model_store import ModelStore
from model_store.stores.object_store import open_source
from server.worker.load_lane import Lane, LoadRun, StepEnd
from server.worker.model_loader import LoadedModel, ModelLoader, StartCode
from server.worker.thread_priority import NICENESS, keep_ordinary_threads, yield_to_others
from tests.e2e.models import pack_forecaster, pack_identity
from tests.processes import list_threads
from tests.server.worker.loads import make_load, run_load

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has a niceness for each thread")
T = TypeVar("T")


def run_yielding(call: Callable[[], T]) -> T:
    """What the call returns on a thread that yields."""
    with ThreadPoolExecutor(1, initializer=yield_to_others) as pool:
        return pool.submit(call).result()


def read_niceness() -> int:
    """That of the calling thread."""
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


def make_loader(folder: Path) -> ModelLoader:
    """A loader of a folder whose models run on two threads."""
    target = Target("cpu", 2, WorkLimits(100.0, 10**9), SessionLimits(1 << 30, 60.0, loops=False))
    return ModelLoader(ModelStore(open_source(str(folder)), None, Limits()), target)


def test_only_a_thread_that_yields_is_nice() -> None:
    """Its own threads are too, which is why there are ordinary ones; the caller keeps its priority."""
    ordinary = read_niceness()
    with keep_ordinary_threads("session", 2) as pool:
        assert run_yielding(read_niceness) == NICENESS
        assert run_yielding(lambda: [pool.submit(read_niceness).result() for _ in range(4)]) == [ordinary] * 4
    assert read_niceness() == ordinary != NICENESS


@pytest.mark.parametrize("yields", [True, False])
def test_a_lane_says_whether_its_threads_yield(*, yields: bool) -> None:
    """All of them, however many it has."""
    together, passed_on = threading.Barrier(2), SimpleQueue[float]()

    def step(run: LoadRun) -> StepEnd:
        del run
        together.wait()
        return StartCode(), float(read_niceness())

    lane = Lane("test", 2, 0.0, step, lambda _lane, _run, end: passed_on.put(end[1]), yields=yields)
    for name in "ab":
        lane.begin(LoadRun(ModelName(name), make_load(lambda: pytest.fail("not run")), 0.0), 0.0)
    assert {passed_on.get() for _ in range(2)} == {NICENESS if yields else read_niceness()}
    lane.close()


def test_threads_of_a_session_do_not_inherit_that_its_loader_yields(tmp_path: Path) -> None:
    """A session has threads of its own, on which requests run: they are ordinary. A row is built where it is loaded."""
    (tmp_path / "net.mar").write_bytes(pack_identity(onnx.TensorProto.FLOAT))
    (tmp_path / "row.mar").write_bytes(pack_forecaster("row.mar", 1).data)
    loader = make_loader(tmp_path)

    def load_onnx() -> tuple[LoadedModel, dict[int, int]]:
        before = list_threads()
        loaded = run_load(loader.load(ModelName("net.mar")))
        return loaded, {task: nice for task, nice in list_threads().items() if task not in before}

    loaded, made = run_yielding(load_onnx)
    assert loaded.row is None
    assert made, "the session has a thread of its own"
    assert set(made.values()) == {read_niceness()}
    assert run_yielding(lambda: run_load(loader.load(ModelName("row.mar")))).row is not None

"""A lane's threads: made when they are missed, ended by its close, and holding nothing of what they ran."""

import gc
import threading
import weakref
from queue import SimpleQueue

import pytest

from model_store.names import ModelName
from server.worker.load_lane import Lane, LoadRun, StepEnd
from server.worker.model_loader import StartCode
from tests.patience import wait_until
from tests.server.worker.loads import make_load

END = StartCode(), 0.0


def make_run(name: str) -> LoadRun:
    """A run whose steps are not looked at."""
    return LoadRun(ModelName(name), make_load(lambda: pytest.fail("not run")), 0.0)


def find_threads(name: str) -> list[threading.Thread]:
    """The threads of the lane of this name."""
    return [thread for thread in threading.enumerate() if thread.name.startswith(f"{name}_")]


def test_threads_are_made_when_they_are_missed_and_end_with_the_lane() -> None:
    """One for runs one after another, three for three at a time, no more than it may have; none is left."""
    goes_on, passed_on = threading.Semaphore(0), SimpleQueue[LoadRun]()

    def step(run: LoadRun) -> StepEnd:
        del run
        goes_on.acquire()
        return END

    lane = Lane("made", 2, 0.0, step, lambda _lane, run, _end: passed_on.put(run), 3)
    for turn in range(4):
        run = make_run(f"m{turn}")
        lane.begin(run, 0.0)
        assert not lane.is_full
        goes_on.release()
        assert passed_on.get() is run
        lane.end(run, 1.0)
    assert len(find_threads("made")) == 1
    runs = [make_run(f"n{turn}") for turn in range(5)]
    for run in runs:
        lane.begin(run, 2.0)
    assert (lane.is_full, lane.stuck_s(5.0), len(find_threads("made"))) == (True, 3.0, 3)
    for _ in runs:
        goes_on.release()
    found = [passed_on.get() for _ in runs]
    assert {run.model for run in found} == {run.model for run in runs}
    for run in found:
        lane.end(run, 6.0)
    assert (lane.running, lane.stuck_s(9.0)) == (set(), 0.0)
    lane.close()
    wait_until(lambda: not find_threads("made"), "the threads have ended")


def test_an_idle_thread_holds_nothing_of_what_it_ran() -> None:
    """A run leads to its archive: idle threads that kept their last ones would hold as many archives."""
    passed_on = SimpleQueue[None]()
    lane = Lane("idle", 1, 0.0, lambda _run: END, lambda _lane, _run, _end: passed_on.put(None))
    run = make_run("m")
    steps = weakref.ref(run.steps)
    lane.begin(run, 0.0)
    passed_on.get()
    lane.end(run, 0.0)
    del run

    def is_gone() -> bool:
        gc.collect()
        return steps() is None

    wait_until(is_gone, "the run is gone")
    lane.close()

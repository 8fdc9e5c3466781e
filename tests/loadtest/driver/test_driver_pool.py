"""Several driver processes on one schedule, against a real server in this process."""

import os
import signal

import numpy as np
import pytest

from loadtest.driver.dialects import DIALECTS
from loadtest.driver.driver_pool import DriverLost, DriverPool, count_drivers
from loadtest.driver.open_loop import LoadTarget, make_target
from loadtest.driver.profiles import ArrivalProcess, Profile, Schedule
from loadtest.driver.run_result import CACHE
from tests.loadtest.peer import Peer, run_peer

pytestmark = pytest.mark.slow


def target_peer(peer: Peer, *models: str) -> LoadTarget:
    """Requests for these models at the peer."""
    requests = [DIALECTS["sagemaker"].request("peer", model, b"{}") for model in models]
    return make_target(f"http://127.0.0.1:{peer.port}", requests)


def test_what_two_processes_saw_is_one_run() -> None:
    """Every request was sent once, and stands where its schedule has it: status, cache and time are its own."""
    n = 200
    model = np.arange(n) % 3
    schedule = Schedule(np.arange(n) / 200, model, 1.0)
    looks: list[float] = []
    with run_peer(Peer()) as peer, DriverPool(target_peer(peer, "hit", "miss", "503"), 2) as pool:
        run = pool.drive(schedule, every_s=0.2, look=looks.append)
        again = pool.drive(Schedule(schedule.at[:20], model[:20], 0.1))
    assert peer.asked == n + 20
    assert run.status.tolist() == [503 if m == 2 else 200 for m in model]
    assert [CACHE[c] for c in run.cache] == [("hit", "miss", "")[m] for m in model]
    assert (run.sent >= schedule.at - 0.001).all()
    assert (run.done > run.sent).all()
    assert 3 <= len(looks) <= 6
    assert looks == sorted(looks)
    assert again.status.tolist() == run.status.tolist()[:20]


def test_wrong_answers_keep_their_number() -> None:
    """A request that a second process sent is named by its place in the whole schedule."""
    schedule = Schedule(np.arange(40) / 400, np.arange(40) % 2, 0.1)
    with run_peer(Peer()) as peer, DriverPool(target_peer(peer, "hit", "nan"), 2) as pool:
        run = pool.drive(schedule)
    assert {i % 2 for i, _ in run.unsound} == {1}
    assert len(run.unsound) == 20


def test_a_dead_driver_is_said() -> None:
    """A process that is killed ends a long run at once, with an error, and the others are ended too."""
    schedule = Schedule(np.linspace(0, 9_900, 100), np.zeros(100, np.int64), 10_000.0)
    with run_peer(Peer()) as peer, DriverPool(target_peer(peer, "hit"), 2) as pool:
        pids = [process.pid for process, _ in pool._members]
        with pytest.raises(DriverLost):
            pool.drive(schedule, every_s=0.1, look=lambda _: os.kill(pids[1], signal.SIGKILL))
    assert [process.is_alive() for process, _ in pool._members] == [False, False]


def test_how_many_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as the highest rate of a quarter of a second needs, not more than cores; one for a normal load."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(4))
    assert count_drivers(Profile(1, 500, arrivals=ArrivalProcess.CONSTANT).schedule(10)) == 1
    assert count_drivers(Profile(1, 20_000, arrivals=ArrivalProcess.CONSTANT).schedule(2)) == 3
    burst = np.concatenate([np.zeros(5_000), [60.0]])
    assert count_drivers(Schedule(burst, np.zeros(5_001, np.int64), 60.0)) == 3
    assert count_drivers(Schedule(np.zeros(100_000), np.zeros(100_000, np.int64), 60.0)) == 4

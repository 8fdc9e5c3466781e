"""The faults, context managers that inject on their way in and heal on their way out, and the seeded schedule."""

import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import httpx

from tests.chaos.checker import Outage
from tests.chaos.world import FOLLOW_S, World, mount
from tests.e2e.test_crashes import POISON
from tests.patience import wait_until
from tests.s3 import Fault as StoreFault

SHORT_S, LONG_S = 2.0, 7.0  #: below and above `worker_timeout_s`
AFTER_KILL_S = 0.3  #: in which clients of a killed front may still be sending to it
HOUR = 3600.0


@dataclass(frozen=True, slots=True)
class Fault:
    """A kind of fault. `part`: what it breaks; two faults of one part are never there at once. `hold_s`: how long."""

    name: str
    part: str
    hold_s: float
    apply: Callable[[World], AbstractContextManager[None]]
    needs: str = ""  #: the field of World without which it cannot be


# --- processes ------------------------------------------------------------------------------------------------------


@contextmanager
def kill_worker(world: World) -> Iterator[None]:
    """SIGKILL one worker. Nothing heals it but the server."""
    with kill_process(world, "worker", world.rng.choice(world.pids("worker"))):
        yield


@contextmanager
def kill_workers(world: World) -> Iterator[None]:
    """SIGKILL all workers at once. It is healed when the server is ready again, which takes the time of a start."""
    begin = time.monotonic()
    with ExitStack() as stack:
        for pid in world.pids("worker"):
            stack.enter_context(kill_process(world, "worker", pid))
        yield
    wait_until(lambda: world.server.http.get(f"{world.server.url}/ready").is_success, "/ready says yes")
    world.say(f"all workers killed: ready again after {time.monotonic() - begin:.1f} s")


@contextmanager
def stop_worker(world: World) -> Iterator[None]:
    """SIGSTOP one worker; SIGCONT, unless it has been replaced meanwhile."""
    with stop_process(world.rng.choice(world.pids("worker"))):
        yield


@contextmanager
def kill_front(world: World) -> Iterator[None]:
    """SIGKILL one front: what it has under way is lost, as docs/stopping.md says."""
    begin = time.monotonic()
    with kill_process(world, "front", world.rng.choice(world.pids("front"))):
        world.history.outages.append(Outage(begin, time.monotonic() + AFTER_KILL_S, cuts=True, down=False))
        yield


@contextmanager
def stop_front(world: World) -> Iterator[None]:
    """SIGSTOP one front: what it has under way waits."""
    begin = time.monotonic()
    with stop_process(world.rng.choice(world.pids("front"))):
        yield
    world.history.outages.append(Outage(begin, time.monotonic() + AFTER_KILL_S, cuts=True, down=False))


@contextmanager
def stop_supervisor(world: World) -> Iterator[None]:
    """SIGSTOP the supervisor: requests do not need it."""
    with stop_process(world.server.process.pid):
        yield


@contextmanager
def kill_supervisor(world: World) -> Iterator[None]:
    """SIGKILL the supervisor; once all its children have ended, as they must, start the server again on its ports."""
    begin = time.monotonic()
    world.server.exit_code = -signal.SIGKILL
    world.server.process.kill()
    world.server.process.wait()
    yield
    world.stop()
    ended = time.monotonic()
    took = world.start()
    world.history.outages.append(Outage(begin, time.monotonic() + AFTER_KILL_S, cuts=True, down=True))
    world.say(f"supervisor killed: all ended after {ended - begin:.1f} s, ready again {took:.1f} s after the start")


@contextmanager
def restart(world: World) -> Iterator[None]:
    """SIGTERM, and a new server on the same ports: connections are refused meanwhile, and no request is lost."""
    begin = time.monotonic()
    world.stop()
    ended = time.monotonic()
    took = world.start()
    world.history.outages.append(Outage(begin, time.monotonic(), cuts=False, down=True))
    world.say(f"restarted: ended after {ended - begin:.1f} s, ready again {took:.1f} s after the start")
    yield


@contextmanager
def kill_process(world: World, kind: str, pid: int) -> Iterator[None]:
    """The process is killed, and after the block the supervisor knows."""
    os.kill(pid, signal.SIGKILL)
    yield
    wait_until(lambda: pid not in world.pids(kind), "the supervisor has seen the death")


@contextmanager
def stop_process(pid: int) -> Iterator[None]:
    """The process is stopped within the block."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


# --- store ----------------------------------------------------------------------------------------------------------


@contextmanager
def break_store(
    world: World,
    *,
    delay_s: float = 0.0,
    status: int | None = None,
    cut_after: int | None = None,
    damaged: bool = False,
) -> Iterator[None]:
    """Within the block every request to the store meets this, as `tests.s3.Fault` has it."""
    fault = StoreFault("", sys.maxsize, status, delay_s, cut_after, damaged)
    begin = time.monotonic()
    world.s3.inject(fault)
    try:
        yield
    finally:
        world.s3.faults.remove(fault)
        world.history.store_broken.append((begin, time.monotonic()))


# --- disk -----------------------------------------------------------------------------------------------------------


@contextmanager
def fill_disk(world: World) -> Iterator[None]:
    """Not a byte is free."""
    assert world.disk is not None
    filler = world.disk / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while file.write(bytes(65536)):
            pass
    with contextlib.suppress(OSError), filler.open("ab", buffering=0) as file:
        while file.write(b"x"):
            pass
    try:
        yield
    finally:
        filler.unlink()


@contextmanager
def forbid_writing(world: World) -> Iterator[None]:
    """The file system of the disk tier is read-only, for root too."""
    assert world.disk is not None
    wait_until(lambda: not mount("-o", "remount,ro", str(world.disk)), "no file is being written")
    try:
        yield
    finally:
        assert not mount("-o", "remount,rw", str(world.disk))


@contextmanager
def delete_disk(world: World) -> Iterator[None]:
    """The disk tier's folder is deleted under the server."""
    shutil.rmtree(world.disk_cache, ignore_errors=True)
    yield


@contextmanager
def replace_disk(world: World) -> Iterator[None]:
    """A file lies where the disk tier's folder was."""
    folder = world.disk_cache

    def try_replace() -> bool:
        shutil.rmtree(folder, ignore_errors=True)
        try:
            folder.touch(exist_ok=False)
        except OSError:
            return False
        return folder.is_file()

    wait_until(try_replace, "the folder is a file")
    try:
        yield
    finally:
        folder.unlink()


# --- clock ----------------------------------------------------------------------------------------------------------


@contextmanager
def step_clock(world: World, seconds: float) -> Iterator[None]:
    """The wall clock of all the server's processes jumps, and back."""
    world.step_clock(seconds)
    try:
        yield
    finally:
        world.step_clock(0)


# --- models and requests --------------------------------------------------------------------------------------------


@contextmanager
def send_poison(world: World) -> Iterator[None]:
    """Requests whose forward ends the worker: they cost two workers, then the model is refused until it is released."""
    model = world.poisonous
    features, context = model.shape
    body = json.dumps({"x": [[POISON] * context] * features}).encode()
    ask = partial(world.server.post, model.name, body, {"Content-Type": "application/json"})
    with ThreadPoolExecutor(3) as pool:
        asked = [pool.submit(ask) for _ in range(3)]
        yield
        for each in asked:
            try:
                status = each.result().status_code
            except httpx.HTTPError as error:
                world.say(f"poison: {error!r}")
            else:
                if status not in (424, 503):
                    world.say(f"poison was answered {status}")
    world.server.fleet("release", model.name)


@contextmanager
def republish(world: World) -> Iterator[None]:
    """Other versions of a few models, which the server notices by itself; then the archives before are put back."""
    before = [world.models[name] for name in choose_rows(world, 3)]
    for model in before:
        world.publish(world.revise(model))
    try:
        yield
    finally:
        for model in before:
            world.publish(model)


@contextmanager
def roll_back(world: World) -> Iterator[None]:
    """Another version of a model serves and is rolled back by one call, while the store has it; then it is followed."""
    (name,) = choose_rows(world, 1)
    before, after = world.models[name], world.revise(world.models[name])
    first = world.history.versions[name][-1].version
    world.command("load", name)
    second = world.publish(after)
    world.command("reload", name)
    rolled = world.command("rollback", name)
    if rolled.get("version") == first:
        world.history.publish(name, first, time.monotonic())
        world.history.replace(name, time.monotonic())
    yield
    if rolled and world.command("follow", name):
        world.history.publish(name, second, time.monotonic())
    world.publish(before)


def choose_rows(world: World, count: int) -> list[str]:
    """Names of models that can have other versions."""
    return world.rng.sample(sorted(name for name in world.models if name.startswith("tcn/")), count)


FAULTS: Mapping[str, Fault] = {
    fault.name: fault
    for fault in (
        Fault("kill-worker", "process", 0.0, kill_worker),
        Fault("kill-workers", "process", SHORT_S, kill_workers),
        Fault("stop-worker", "process", SHORT_S, stop_worker),
        Fault("stop-worker-long", "process", LONG_S, stop_worker),
        Fault("kill-front", "process", 0.0, kill_front),
        Fault("stop-front", "process", SHORT_S, stop_front),
        Fault("stop-supervisor", "process", SHORT_S, stop_supervisor),
        Fault("kill-supervisor", "process", 0.0, kill_supervisor),
        Fault("restart", "process", 0.0, restart),
        Fault("poison", "process", SHORT_S, send_poison),
        Fault("store-slow", "store", 4.0, partial(break_store, delay_s=1.0)),
        Fault("store-hangs", "store", 6.0, partial(break_store, delay_s=5.0)),
        Fault("store-5xx", "store", 4.0, partial(break_store, status=503)),
        Fault("store-cut", "store", 4.0, partial(break_store, cut_after=100)),
        Fault("store-wrong", "store", 3.0, partial(break_store, damaged=True)),
        Fault("store-gone", "store", 10.0, partial(break_store, cut_after=-1)),
        Fault("republish", "store", FOLLOW_S, republish),
        Fault("rollback", "store", SHORT_S, roll_back),
        Fault("disk-full", "disk", 4.0, fill_disk, needs="disk"),
        Fault("disk-read-only", "disk", 4.0, forbid_writing, needs="disk"),
        Fault("disk-deleted", "disk", SHORT_S, delete_disk),
        Fault("disk-replaced", "disk", SHORT_S, replace_disk),
        Fault("clock-forward", "clock", SHORT_S, partial(step_clock, seconds=HOUR), needs="clock"),
        Fault("clock-back", "clock", SHORT_S, partial(step_clock, seconds=-HOUR), needs="clock"),
    )
}
PAIRS = 0.3  #: of the steps after the first round have two faults


def make_schedule(seed: int, faults: Sequence[Fault]) -> Iterator[tuple[Fault, ...]]:
    """Faults by steps, without end: first each by itself in a seeded order, then rounds in which some come in pairs."""
    rng = random.Random(seed)
    for turn in itertools.count():
        for fault in rng.sample(faults, len(faults)):
            others = [each for each in faults if each.part != fault.part]
            if turn and others and rng.random() < PAIRS:
                yield (fault, rng.choice(others))
            else:
                yield (fault,)


@contextmanager
def apply_faults(world: World, faults: Sequence[Fault]) -> Iterator[None]:
    """All of them within the block."""
    with ExitStack() as stack:
        for fault in faults:
            stack.enter_context(fault.apply(world))
        yield

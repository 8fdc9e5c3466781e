"""A replica's server as the replica sees it, without Ray: it starts by a pipe, is well or not, and ends with it."""

import os
import signal
from pathlib import Path

import httpx
import pytest

from loadtest.peers.process_tree import ProcessTree
from server.cluster.engine import Engine, EngineFailed
from server.cluster.slots import claim_slot
from server.settings import Settings
from tests.patience import PATIENCE_S, wait_until

pytestmark = pytest.mark.e2e

NO_WORKER = "the server says 503 on /ready: no worker takes requests"


def make_settings(folder: Path, **more: object) -> Settings:
    """A small server of an empty store, with a secret that must not show."""
    (folder / "store").mkdir(exist_ok=True)
    ports = {"inference_port": 0, "management_port": 0, "metrics_port": 0}
    keys = {"access_keys": {"AKIA": "a-secret-that-must-not-show"}}
    given = {"store": str(folder / "store"), "workers": 1, "device": "cpu", "drain_s": 5, **ports, **keys, **more}
    return Settings.from_wire({**given, "disk_cache": str(folder / "cache")})


def find_worker(engine: Engine) -> int:
    """The pid of its only worker."""
    reply = httpx.get(f"{engine.addresses['management']}/fleet/processes", trust_env=False, timeout=PATIENCE_S)
    (pid,) = (row["pid"] for row in reply.json()["processes"] if row["kind"] == "worker")
    return int(pid)


def find_trouble(engine: Engine) -> str:
    """What the replica's health check says is wrong; empty where it is well."""
    try:
        engine.check(PATIENCE_S)
    except EngineFailed as error:
        return str(error)
    return ""


def test_a_server_that_is_dead_or_stands_still_is_seen_and_ends_with_its_replica(tmp_path: Path) -> None:
    """It is well while it serves. Stopped, it does not answer; while its only worker stands still, it answers and is
    not well all the same; its end is said. No other user of the host reads its secrets from its command or environment.
    When the replica lets go of the pipe all of it ends, and the place is free.
    """
    slot = claim_slot(tmp_path / "disk", 1)
    engine = Engine(make_settings(tmp_path, worker_timeout_s=PATIENCE_S), slot.folder, slot.lock)
    shown = b"".join(Path(f"/proc/{engine.pid}/{name}").read_bytes() for name in ("cmdline", "environ"))
    assert b"must-not-show" not in shown
    engine.check(PATIENCE_S)
    tree = ProcessTree(engine.pid)
    tree.signal(signal.SIGSTOP)
    with pytest.raises(EngineFailed, match="does not answer"):
        engine.check(0.2)
    tree.signal(signal.SIGCONT)
    engine.check(PATIENCE_S)
    worker = find_worker(engine)
    os.kill(worker, signal.SIGSTOP)
    wait_until(lambda: find_trouble(engine) == NO_WORKER, "the only worker is seen to stand still")
    os.kill(worker, signal.SIGCONT)
    wait_until(lambda: not find_trouble(engine), "the worker turns again")
    engine.stop()
    with pytest.raises(EngineFailed, match="ended with 0"):
        engine.check(PATIENCE_S)
    wait_until(lambda: not tree.pids(), "all of it ends")
    slot.release()
    claim_slot(tmp_path / "disk", 1, wait_s=PATIENCE_S).release()


def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    """Its replica's error has the reason that the log ends with."""
    slot = claim_slot(tmp_path / "disk", 1)
    with pytest.raises(EngineFailed, match="other hosts could use the management listener"):
        Engine(make_settings(tmp_path, management_host="0.0.0.0"), slot.folder, slot.lock)
    slot.release()

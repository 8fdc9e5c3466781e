"""Workers whose step loop stops: who notices, how soon requests go elsewhere, and that the worker is replaced."""

import os
import signal
import time
from functools import partial

import pytest

from tests.e2e.conftest import Serve
from tests.e2e.models import fleet
from tests.e2e.server import Load, Server, upload
from tests.e2e.test_deaths import is_up
from tests.patience import PATIENCE_S, wait_until
from tests.s3 import S3Server

pytestmark = pytest.mark.e2e


def test_a_stopped_worker_is_routed_around_and_replaced(s3: S3Server, store: str, serve: Serve) -> None:
    """SIGSTOP under load: requests that it has are asked elsewhere, `worker_up` is 0, lists and metrics do not wait for
    it, and SIGCONT before `worker_timeout_s` brings it back; a stop that lasts gets it killed and replaced. No request
    fails, none waits for the kill.
    """
    models = fleet("stalls", 12)
    upload(s3, store, models)
    questions = [model.question(1) for model in models]
    with serve(workers=2, worker_timeout_s=PATIENCE_S) as server:
        for question in questions:
            server.ask(question)
        victim, other = server.processes("worker")
        with Load(server, questions) as load:
            load.more(20)
            os.kill(victim["pid"], signal.SIGSTOP)
            wait_until(partial(is_silent, server, victim["index"]), "the supervisor knows")
            load.more(40)  # more than there are clients: the load does not wait for the worker
            began = time.monotonic()
            listed = server.http.get(f"{server.addresses['management']}/fleet/models", params={"limit": "1000"}).json()
            assert time.monotonic() - began < PATIENCE_S / 4, "it would wait for the worker's time-out"
            assert listed["unheard_workers"] == [victim["index"]]
            assert {row["worker"] for model in listed["models"] for row in model["holders"]} == {other["index"]}
            assert server.total("fleetcast_worker_up", worker=str(victim["index"])) == 0
            os.kill(victim["pid"], signal.SIGCONT)
            wait_until(lambda: not is_silent(server, victim["index"]), "it beats again")
            load.more(20)
            assert server.total("fleetcast_worker_up", worker=str(victim["index"])) == 1
        assert {outcome.problem for outcome in load.outcomes} == {""}
        assert server.processes("worker")[victim["index"]]["pid"] == victim["pid"]


def test_a_worker_that_stays_stopped_is_replaced(s3: S3Server, store: str, serve: Serve) -> None:
    """After `worker_timeout_s` it is killed, by name of the setting, and the next one serves; also where it is the only
    one: its request waits for the next, and is answered.
    """
    models = fleet("replaced", 2)
    upload(s3, store, models)
    with serve(workers=1, worker_timeout_s=3) as server:
        server.ask(models[0].question(0))
        victim, *_ = server.processes("worker")
        os.kill(victim["pid"], signal.SIGSTOP)
        wait_until(partial(is_up, server, "worker", 0, 2), "the next worker is up")
        server.ask(models[1].question(0))
        assert "worker_timeout_s" in server.said()
        assert server.total("fleetcast_worker_restarts_total") == 1


def is_silent(server: Server, worker: int) -> bool:
    """Whether the supervisor says that the worker is silent."""
    return "silent_s" in server.processes("worker")[worker]

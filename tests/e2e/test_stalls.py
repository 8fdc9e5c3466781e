"""Workers whose step loop or loads stop: who notices, how soon requests go elsewhere, and what `/ready` says."""

import os
import signal
import time
from functools import partial
from typing import Any

import pytest

from model_store.archives.manifest import GoldenSample
from tests.e2e.conftest import Serve
from tests.e2e.models import pack_fleet
from tests.e2e.server import Load, Server, is_answered, upload
from tests.e2e.test_bounded_work import rounds_by_request
from tests.e2e.test_deaths import is_up
from tests.patience import PATIENCE_S, wait_until
from tests.s3 import S3Server

pytestmark = pytest.mark.e2e


def test_a_stopped_worker_is_routed_around_and_replaced(s3: S3Server, store: str, serve: Serve) -> None:
    """SIGSTOP under load: requests that it has are asked elsewhere, `worker_up` is 0, lists and metrics do not wait for
    it, and SIGCONT before `worker_timeout_s` brings it back; a stop that lasts gets it killed and replaced. No request
    fails, none waits for the kill.
    """
    models = pack_fleet("stalls", 12)
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
            listed = list_models(server)
            assert time.monotonic() - began < PATIENCE_S / 4, "it would wait for the worker's time-out"
            assert victim["index"] in listed["unheard_workers"]
            # Where the machine stands still for a moment, the other worker is silent for as long.
            wait_until(lambda: list_models(server)["unheard_workers"] == [victim["index"]], "the other one is heard")
            assert victim["index"] not in find_holders(listed)
            wait_until(lambda: find_holders(list_models(server)) == {other["index"]}, "the other one holds models")
            assert server.total("fleetcast_worker_up", worker=str(victim["index"])) == 0
            assert ask_readiness(server)[1][victim["index"]]["state"] == "silent"
            wait_until(lambda: ask_readiness(server)[1][other["index"]]["state"] == "ready", "the other one is ready")
            wait_until(lambda: ask_readiness(server)[0] == 200, "the server is ready")
            os.kill(victim["pid"], signal.SIGCONT)
            wait_until(lambda: not is_silent(server, victim["index"]), "it beats again")
            load.more(20)
            up = partial(server.total, "fleetcast_worker_up", worker=str(victim["index"]))
            wait_until(lambda: up() == 1, "it is up")
        assert {outcome.problem for outcome in load.outcomes} == {""}
        assert server.processes("worker")[victim["index"]]["pid"] == victim["pid"]


def test_a_worker_that_stays_stopped_is_replaced(s3: S3Server, store: str, serve: Serve) -> None:
    """After `worker_timeout_s` it is killed, by name of the setting, and the next one serves; also where it is the only
    one: its request waits for the next, and is answered.
    """
    models = pack_fleet("replaced", 2)
    upload(s3, store, models)
    with serve(workers=1, worker_timeout_s=6) as server:
        server.ask(models[0].question(0))
        victim, *_ = server.processes("worker")
        os.kill(victim["pid"], signal.SIGSTOP)
        wait_until(partial(is_up, server, "worker", 0, 2), "the next worker is up")
        server.ask(models[1].question(0))
        wait_until(lambda: "worker_timeout_s" in server.said(), "the log names the setting")
        assert server.total("fleetcast_worker_restarts_total") == 1


def list_models(server: Server) -> dict[str, Any]:
    """`GET /fleet/models`."""
    url = f"{server.addresses['management']}/fleet/models"
    listed: dict[str, Any] = server.http.get(url, params={"limit": "1000"}).json()
    return listed


def find_holders(listed: dict[str, Any]) -> set[int]:
    """The workers that hold a model of the list."""
    return {row["worker"] for model in listed["models"] for row in model["holders"]}


def is_silent(server: Server, worker: int) -> bool:
    """Whether the supervisor says that the worker is silent."""
    return "silent_s" in server.processes("worker")[worker]


def test_stuck_loads_and_a_store_that_is_gone_are_told_apart(s3: S3Server, store: str, serve: Serve) -> None:
    """A failing store is said, and the worker is ready; a load that holds the only loader thread makes it not ready,
    while the models that it holds are answered.
    """
    models = pack_fleet("probe", 3)
    upload(s3, store, models)
    s3.put(store, "stuck.mar", rounds_by_request(GoldenSample(request={"x": [9e18]}, response={"predictions": [0.0]})))
    settings = {"loader_threads": 1, "store_timeout_s": 5, "store_retries": 0, "disk_cache_bytes": 0}
    with serve(**settings, onnx_control_flow="allow", max_forward_s=PATIENCE_S, drain_s=1) as server:
        server.ask(models[0].question(0))
        wait_until(lambda: ask_readiness(server) == (200, [{"worker": 0, "state": "ready"}]), "it is ready")
        with s3.outage():
            assert server.post(models[1].name).status_code >= 500
            wait_until(lambda: "store_failing_s" in ask_readiness(server)[1][0], "the store is said to fail")
            wait_until(lambda: ask_readiness(server)[1][0]["state"] == "ready", "the worker is ready all the same")
            wait_until(lambda: ask_readiness(server)[0] == 200, "and so is the server")
            server.ask(models[0].question(1))
        wait_until(lambda: is_answered(server, models[2]), "the store is back")
        wait_until(lambda: "store_failing_s" not in ask_readiness(server)[1][0], "and not said to fail any more")
        server.post("stuck.mar", headers={"X-Request-Timeout-Ms": "100"})
        wait_until(lambda: ask_readiness(server)[1][0]["state"] == "loads_stuck", "the loader thread is stuck")
        assert ask_readiness(server)[0] == 503
        assert server.http.get(f"{server.url}/ping").status_code == 200
        server.ask(models[0].question(2))


def ask_readiness(server: Server) -> tuple[int, list[dict[str, Any]]]:
    """The status of `/ready`, and what it says of the workers."""
    answer = server.http.get(f"{server.url}/ready")
    said = answer.json()
    assert said["ready"] == (answer.status_code == 200)
    return answer.status_code, list(said["states"])

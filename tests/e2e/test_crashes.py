"""A request whose forward ends its worker, as a fault in native code would: who is blamed, and what the others notice.

The fault is put into the workers by a `sitecustomize` on their PYTHONPATH: rows with a certain number abort, and the
load of one model does.
"""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.models import pack_fleet
from tests.e2e.server import ROOT, Load, Server, run_server, upload
from tests.patience import wait_until
from tests.s3 import S3Server

pytestmark = pytest.mark.e2e

POISON = 666.0
NEVER_LOADED = "crash/load.mar"
FAULT = f"""
import os, sys
if "server.worker.main" in " ".join(sys.orig_argv):
    from server.worker.engine.cpu import Engine
    run = Engine.run
    def run_or_abort(self, family, offsets, parts):
        if any((part == {POISON}).any() for part in parts):
            os.abort()
        return run(self, family, offsets, parts)
    Engine.run = run_or_abort
    from model_store.stores.model_store import ModelStore
    at_hand = ModelStore.at_hand
    def find_or_abort(self, model, **more):
        if model == {NEVER_LOADED!r}:
            os.abort()
        return at_hand(self, model, **more)
    ModelStore.at_hand = find_or_abort
"""
MODELS = pack_fleet("crash", 12)
CULPRIT, *INNOCENTS = MODELS


@pytest.fixture
def faulty(s3: S3Server, store: str, tmp_path: Path) -> dict[str, Any]:
    """Settings of a server whose workers abort at a poisonous row."""
    upload(s3, store, MODELS)
    (tmp_path / "sitecustomize.py").write_text(FAULT)
    return {"environment": {"PYTHONPATH": f"{tmp_path}:{ROOT}"}}


def ask_poison(server: Server, ident: str) -> httpx.Response:
    """The answer to a request that ends whichever worker runs it."""
    features, context = CULPRIT.shape
    body = json.dumps({"x": [[POISON] * context] * features}).encode()
    return server.post(CULPRIT.name, body, {"X-Request-Id": ident, "Content-Type": "application/json"})


def test_a_poisonous_request_costs_two_workers_and_nobody_else_anything(
    s3: S3Server, store: str, tmp_path: Path, faulty: dict[str, Any]
) -> None:
    """Several poisonous requests at once under load: two deaths, then the model is in quarantine with the reason, and
    each of them is refused as its fault; a good request for it is refused too, at once, until it is released. All
    requests for other models are answered right, without a refusal. The log names the suspects and the request.
    """
    questions = [model.question(1) for model in INNOCENTS]
    with (
        run_server(s3, tmp_path, f"s3://{store}", workers=3, fronts=2, **faulty) as server,
        ThreadPoolExecutor(4) as pool,
    ):
        for question in [*questions, CULPRIT.question(0)]:
            server.ask(question)
        with Load(server, questions, clients=4) as load:
            load.more(20)
            asked = list(pool.map(lambda i: ask_poison(server, f"poison-{i}"), range(4)))
            load.more(20)
            assert {answer.status_code for answer in asked} == {424}
            assert all("quarantined" in answer.json()["message"] for answer in asked)
            again = server.post(CULPRIT.name, CULPRIT.question(0).body)
            assert (again.status_code, "workers died while it ran" in again.text) == (424, True)
            assert server.total("fleetcast_worker_restarts_total") == 2
            load.more(20)
        assert {outcome.problem for outcome in load.outcomes} == {""}
        poison = {f"poison-{i}" for i in range(4)}
        wait_until(lambda: list_suspect_requests(server) & poison, "the log names a request that a worker died of")
        lines = list_log_lines(server)
        assert all(CULPRIT.name in line["models"] for line in lines if line["event"] == "suspects" and "child" in line)
        row = server.models()[CULPRIT.name]
        assert (row["state"], row["reason"]) == ("quarantined", "2 workers died while it ran")
        assert set(server.models()) == {model.name for model in MODELS}
        wait_until(lambda: all(row["up"] for row in server.processes("worker")), "all workers are back")
        assert server.fleet("release", CULPRIT.name).json()["released"]
        server.ask(CULPRIT.question(2))
        assert server.total("fleetcast_worker_restarts_total") == 2
        answer = server.post(NEVER_LOADED)
        assert (answer.status_code, "quarantined" in answer.text) == (424, True), "a load is blamed as a run is"
        assert server.total("fleetcast_worker_restarts_total") == 4


def list_log_lines(server: Server) -> list[dict[str, Any]]:
    """The lines of the log that are JSON."""
    return [json.loads(line) for line in server.said().splitlines() if line.startswith("{")]


def list_suspect_requests(server: Server) -> set[str]:
    """The ids of requests that were under way at workers that died."""
    return {line["request_id"] for line in list_log_lines(server) if line["event"] == "suspect_request"}


def test_a_single_worker_is_ended_twice_by_one_model_at_most(
    s3: S3Server, store: str, tmp_path: Path, faulty: dict[str, Any]
) -> None:
    """Without another worker the requests of others wait until it is back, and are answered."""
    questions = [model.question(1) for model in INNOCENTS[:3]]
    with run_server(s3, tmp_path, f"s3://{store}", workers=1, **faulty) as server:
        for question in [*questions, CULPRIT.question(0)]:
            server.ask(question)
        with Load(server, questions) as load:
            load.more(5)
            assert ask_poison(server, "poison").status_code == 424
            load.more(5)
        assert {outcome.problem for outcome in load.outcomes} == {""}
        assert server.total("fleetcast_worker_restarts_total") == 2

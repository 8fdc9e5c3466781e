"""The planner and a real server have the same hits for the same requests; costs are measured on a real server."""

import http.client
import json
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from typer.testing import CliRunner

from loadtest.cli import app
from loadtest.driver.profiles import Profile
from loadtest.driver.run_result import CACHE
from loadtest.fleets.fleet import make_fleet
from loadtest.fleets.network_shape import make_request
from loadtest.fleets.synthetic_archives import build_network
from loadtest.observe.local_server import run_local_server
from loadtest.plan.calibrate import HOT
from loadtest.plan.costs import DEFAULT, read_costs
from loadtest.plan.simulate import make_cache
from loadtest.plan.simulated_worker import SimulatedModel, SimulatedWorker
from server.contract import CACHE_REQUESTS

MODELS, RESIDENT, REQUESTS = 20, 6, 200


@pytest.mark.e2e
@pytest.mark.parametrize("policy", ["lru", "s3fifo"])
def test_simulated_hits_are_the_servers(tmp_path: Path, policy: str) -> None:
    """One request after the other over loopback: every single answer is the hit or miss that was simulated."""
    names = make_fleet(str(tmp_path), MODELS)
    row_bytes = build_network("tcn").family.row_floats * 4
    asked = Profile(MODELS, REQUESTS / 10, seed=3).schedule(10.0).model.tolist()
    room = ["--workers", "1", "--slab-bytes", str(row_bytes), "--model-cache-bytes", str(RESIDENT * row_bytes)]
    room += ["--eviction-policy", policy]
    body = json.dumps(make_request(0)).encode()
    with run_local_server(str(tmp_path), room) as server:
        connection = http.client.HTTPConnection(urlsplit(server.inference).netloc)
        said = [_ask(connection, names[i], body) for i in asked]
        connection.close()
        counts = server.totals(CACHE_REQUESTS.series, "result")
    worker = SimulatedWorker(make_cache(RESIDENT * row_bytes, row_bytes, policy), DEFAULT, np.random.default_rng(0))
    at = np.arange(len(asked), dtype=np.float64)
    ran = worker.run(at, [SimulatedModel(names[i], row_bytes, "tcn") for i in asked])
    assert said == [CACHE[outcome] for outcome in ran.outcome.tolist()]
    assert 0.3 < said.count("hit") / len(said) < 0.9
    assert counts["hit"] == said.count("hit")


def _ask(connection: http.client.HTTPConnection, name: str, body: bytes) -> str:
    """What the server says that its cache did."""
    headers = {"Content-Type": "application/json", "X-Amzn-SageMaker-Target-Model": name}
    connection.request("POST", "/invocations", body, headers)
    reply = connection.getresponse()
    text = reply.read()
    assert reply.status == 200, text
    return reply.headers["X-Fleetcast-Cache"]


@pytest.mark.e2e
def test_costs_of_a_real_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From archives to costs that `plan` reads: loads from the store and, unloaded, from disk; hits; full steps."""
    models, out = str(tmp_path / "models"), tmp_path / "costs.json"
    make_fleet(models, 12 + HOT)
    for name in ("HIT_S", "FULL_S"):  # how exact they are is not the question here
        monkeypatch.setattr(f"loadtest.plan.calibrate.{name}", 0.5)
    ran = CliRunner().invoke(app, ["calibrate", "--store", models, "--out", str(out)])
    assert ran.exit_code == 0, ran.output
    costs = read_costs(out)
    assert costs.said.startswith(f"{models}: 12 loads from the store, 12 from disk, ")
    assert costs.device == "cpu"
    assert costs.step_s + costs.row_s > 0
    assert len(costs.build) == 12
    assert max(costs.build) > 0
    assert min(costs.overhead) >= 0

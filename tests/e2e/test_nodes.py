"""Nodes of a cluster: a model lives on one of them, whichever is asked; a node ends, and its models alone move."""

import json
import os
import signal
from pathlib import Path

import httpx
import pytest
import trustme

from tests.e2e.models import pack_fleet
from tests.e2e.nodes import Nodes, run_nodes
from tests.e2e.server import Load, Server, upload
from tests.patience import PATIENCE_S, wait_until
from tests.s3 import S3Server

pytestmark = pytest.mark.e2e

MODELS = pack_fleet("node", 48)
QUESTIONS = [model.question(1) for model in MODELS]
NAMES = ("a", "b", "c")


def count(server: Server, name: str) -> float:
    """The sum of a counter over its labels."""
    return sum(value for (series, _), value in server.series().items() if series == name)


def count_loads(nodes: Nodes, *names: str) -> float:
    """The loads that these nodes have done."""
    return sum(count(nodes.servers[name], "fleetcast_model_loading_seconds_count") for name in names)


def ask_all(nodes: Nodes, name: str) -> None:
    """Ask each model through one node, and check the numbers."""
    for question in QUESTIONS:
        nodes.servers[name].ask(question)


def test_each_model_lives_on_one_node_and_a_node_that_is_killed_moves_only_its_own(
    s3: S3Server, store: str, tmp_path: Path
) -> None:
    """All nodes answer for all models, each of which is loaded once in the cluster. One node is killed under load: no
    answer is lost or wrong at the others, which load its models and no more.
    """
    upload(s3, store, MODELS)
    with run_nodes(s3, tmp_path, f"s3://{store}", NAMES) as nodes:
        wait_until(lambda: _are_linked(nodes), "the nodes forward to each other")
        settled = count_loads(nodes, *NAMES)
        for name in NAMES:
            ask_all(nodes, name)
        assert count_loads(nodes, *NAMES) - settled <= len(MODELS)
        first = nodes.servers["a"]
        assert count(first, "fleetcast_forwarded_requests_total") >= len(MODELS) / 3
        own = {model for model, holders in nodes.holders().items() if "c" in holders}
        before = count_loads(nodes, "a", "b")
        with Load(first, QUESTIONS) as load:
            load.more(20)
            os.kill(nodes.servers["c"].process.pid, signal.SIGKILL)
            nodes.servers["c"].exit_code = -signal.SIGKILL
            load.more(3 * len(MODELS))
        assert {outcome.problem for outcome in load.outcomes} == {""}
        assert 0 < len(own) < len(MODELS)
        assert count_loads(nodes, "a", "b") - before <= len(own)


def test_a_model_elsewhere_answers_as_one_at_home_over_tls(s3: S3Server, store: str, tmp_path: Path) -> None:
    """Two nodes that speak TLS with a certificate of no authority. Bodies and answers of many chunks, calls for many
    models, what a model is, refusals and deadlines are the same whichever is asked; a load by the Open Inference
    Protocol goes to the owner; each series has the label `node`.
    """
    upload(s3, store, MODELS[:12])
    certificate = write_certificate(tmp_path)
    http = httpx.Client(verify=False, timeout=PATIENCE_S, trust_env=False)
    given = {"tls_certificate": certificate, "http": http, "repository_control": "on"}
    with run_nodes(s3, tmp_path, f"s3://{store}", ("a", "b"), **given) as nodes:
        a, b = nodes.servers.values()
        wait_until(lambda: _ask_both(nodes) and _forwarded(a) > 0 < _forwarded(b), "the nodes forward to each other")
        for model in MODELS[:8]:
            many = json.dumps({"x": [json.loads(model.question(1).body)["x"]] * 1}).encode()
            large = json.dumps({"instances": [json.loads(model.question(1).body)] * 2000}).encode()
            for body in (many, large, b"{", b'{"x": 1}'):
                said = [_ask(server, model.name, body) for server in (a, b)]
                assert said[0] == said[1]
            described = [http.get(f"{server.url}/v2/models/{model.name}") for server in (a, b)]
            assert [reply.status_code for reply in described] == [200, 200], described[0].text + described[1].text
            assert described[0].content == described[1].content
        assert _ask(a, "no/such.mar", b"{}") == _ask(b, "no/such.mar", b"{}")
        late = [server.post(MODELS[0].name, b"{}", {"X-Request-Timeout-Ms": "1"}).status_code for server in (a, b)]
        assert set(late) <= {424, 400}
        for server in (a, b):
            fresh = [model.name for model in MODELS[8:12]]
            loaded = [http.post(f"{server.url}/v2/repository/models/{name}/load").status_code for name in fresh]
            assert loaded == [200] * len(fresh)
        holders = nodes.holders()
        assert [len(holders[name]) for name in fresh] == [1] * len(fresh)
        lines = [line for line in a.exposition().splitlines() if line.startswith("fleetcast_")]
        assert lines
        assert all('node="a"' in line for line in lines)


def write_certificate(folder: Path) -> Path:
    """A certificate with its key, of an authority that nobody knows."""
    file = folder / "node.pem"
    made = trustme.CA().issue_cert("127.0.0.1")
    file.write_bytes(made.private_key_pem.bytes() + made.cert_chain_pems[0].bytes())
    return file


def _ask(server: Server, model: str, body: bytes) -> tuple[int, bytes]:
    reply = server.post(model, body, {"Content-Type": "application/json"})
    return reply.status_code, reply.content


def _ask_both(nodes: Nodes) -> bool:
    return all(
        _ask(server, model.name, model.question(1).body)[0] == 200
        for server in nodes.servers.values()
        for model in MODELS[:8]
    )


def _forwarded(server: Server) -> float:
    return count(server, "fleetcast_forwarded_requests_total")


def _are_linked(nodes: Nodes) -> bool:
    ask_all(nodes, "a")
    ask_all(nodes, "b")
    forwarded = [count(nodes.servers[name], "fleetcast_forwarded_requests_total") for name in ("a", "b")]
    return min(forwarded) > len(MODELS) / 3

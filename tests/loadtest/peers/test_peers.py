"""The comparison with other servers, without them: requests, measurements, and servers that drop out with a reason."""

import io
import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from loadtest.driver import wrk
from loadtest.driver.dialects import DIALECTS
from loadtest.observe.processes import wait_until
from loadtest.peers import comparison, environments, servers
from loadtest.peers.comparison import PeerComparison, write_models
from loadtest.peers.comparison_table import (
    OURS,
    OURS_NPY,
    build_table,
    describe_servers,
    order_turns,
    summarize_runs,
)
from loadtest.peers.environments import PeerUnavailable, find_requirements, parse_pins
from loadtest.peers.network import load_network
from loadtest.peers.over_memory import grow_past_memory
from loadtest.peers.peer_server import PeerServer
from loadtest.peers.process_tree import ProcessTree, start_process
from loadtest.peers.servers import PACKAGE, PEERS
from server.contract import JSON
from tests.http_servers import serve_on_thread
from tests.loadtest.peers.runs import make_runs

NEEDS_WRK = pytest.mark.skipif(shutil.which("wrk") is None, reason="wrk is not installed (apt-get install wrk)")


@dataclass
class Site:
    """A real HTTP server: answers with `predictions` of the model in the path or a header, and keeps what was asked."""

    predictions: dict[str, list[float]] = field(default_factory=dict)
    refuses: str = ""
    seen: set[tuple[str, str, str, bytes]] = field(default_factory=set)
    port: int = 0

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.port}"


@contextmanager
def serve_site(of: Site) -> Iterator[Site]:
    """Serve in threads until the end of the block."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            target = self.headers.get(
                "X-Amzn-SageMaker-Target-Model", self.headers.get("serve_multiplexed_model_id", "")
            )
            of.seen.add((self.path, target, self.headers["Content-Type"], body))
            model = target or self.path.split("/")[-1]
            data = json.dumps({"predictions": of.predictions.get(model, [0.0])}).encode()
            self.send_response(503 if model == of.refuses else 200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    of.port = server.server_address[1]
    with serve_on_thread(server):
        yield of


@NEEDS_WRK
@pytest.mark.parametrize(
    ("dialect", "wanted"),
    [
        ("sagemaker", {("/invocations", f"m{i}.mar") for i in range(7)}),
        ("torchserve", {(f"/predictions/m{i}.mar", "") for i in range(7)}),
        ("mms", {(f"/predictions/m{i}.mar", "") for i in range(7)}),
        ("v2", {(f"/v2/models/m{i}.mar/infer", "") for i in range(7)}),
        ("ray", {("/", f"m{i}.mar") for i in range(7)}),
    ],
)
@pytest.mark.slow
def test_wrk_asks_every_model_in_its_dialect(dialect: str, wanted: set[tuple[str, str]], tmp_path: Path) -> None:
    """All models have their turn, named where the protocol has the name, one body; 7 is the stride's multiple."""
    body = DIALECTS[dialect].tensor_body(np.full((8, 168), 1 / 7, np.float32))
    (tmp_path / "body").write_bytes(body)
    with serve_site(Site()) as there:
        target = wrk.WrkTarget("site", there.url, 7, ".mar", tmp_path / "body", JSON, DIALECTS[dialect])
        result = wrk.run_wrk(target, 2, 1)
    assert there.seen == {(path, model, JSON, body) for path, model in wanted}
    assert result.requests_per_s > 10
    assert 0 < result.p50_ms <= result.p99_ms


@NEEDS_WRK
@pytest.mark.slow
def test_wrk_counts_no_refusal(tmp_path: Path) -> None:
    """One model of four answers 503: there is no result, but an error that says how many failed."""
    (tmp_path / "body").write_bytes(b"{}")
    with (
        serve_site(Site(refuses="m2")) as there,
        pytest.raises(RuntimeError, match=r"site: \d+ of \d+ requests failed"),
    ):
        wrk.run_wrk(wrk.WrkTarget("site", there.url, 4, "", tmp_path / "body", JSON), 2, 1)


def test_turns_rotate() -> None:
    """In as many rounds as there are servers each is first once, and in every round each has one turn."""
    rounds = [order_turns(["a", "b", "c"], number) for number in range(4)]
    assert rounds == [["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"], ["a", "b", "c"]]


def test_ratios_are_of_the_same_round() -> None:
    """A machine that slows down for a round slows both: the ratio of each round stays, that of medians would not."""
    row = summarize_runs(make_runs(10, 50, 12), {OURS: make_runs(100, 500, 120)})["8 connections"]
    assert row[f"{OURS} / it"]["requests_per_s"] == {"median": 10, "min": 10, "max": 10, "runs": 3}
    assert row[f"{OURS} / it"]["p50"]["median"] == pytest.approx(0.1)
    assert row["requests_per_s"] == {"median": 12, "min": 10, "max": 50, "runs": 3}
    assert f"{OURS} / it" not in summarize_runs(make_runs(1), {})["8 connections"]


def test_the_table_says_all() -> None:
    """Medians with spread, load time, memory; who is missing and why, who was stopped, what exceeded memory did."""
    ours, npy, its = make_runs(100, 200, 300), make_runs(200, 400, 600), make_runs(10, 20, 25)
    told = {"version": "1.2", "load_ms": {"median": 3000.0, "min": 2900.0, "max": 3100.0}, "mb_per_model": 168.04}
    results = {
        "models": 8,
        "rounds": 3,
        "seconds": 1,
        "servers": {
            OURS: {"version": "abc", "stopped_between_turns": False, **summarize_runs(ours, {})},
            "mms": {
                **told,
                "stopped_between_turns": True,
                "beyond": "killed",
                **summarize_runs(its, {OURS: ours, OURS_NPY: npy}),
            },
        },
        "unavailable": {"torchserve": "needs Java 17"},
    }
    file = io.StringIO()
    Console(file=file, width=165).print(build_table(results), "\n".join(describe_servers(results)))
    text = file.getvalue()
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert (
        "mms 1 20.0 (10.0-25.0) 50.0 (40.0-100) 250 10.0 (10.0-12.0) 0.100 (0.083-0.100) 20.0 (20.0-24.0) "
        "3000 (2900-3100) 168" in lines
    )
    assert "1.2 8 20.0 (10.0-25.0) 50.0 (40.0-100) 250 10.0 (10.0-12.0) 0.100 (0.083-0.100) 20.0 (20.0-24.0)" in lines
    assert "torchserve was not measured: needs Java 17" in lines
    assert "mms: killed" in lines
    assert any(line.startswith("Stopped (SIGSTOP)") and line.endswith("idle: mms.") for line in lines)


@pytest.mark.parametrize("peer", PEERS)
def test_requirements_pin_exactly(peer: str) -> None:
    """Every line is package==version, the peer itself and our torch among them: the numbers can be had again."""
    found = parse_pins(find_requirements(peer).read_text())
    assert found[PACKAGE[peer]]
    assert found["torch"] == "2.13.0"


@pytest.mark.parametrize("line", ["torch", "torch>=2", "torch==2.*", "ray[serve]==2.60.0", "a==1 ; python_version<'4'"])
def test_what_does_not_pin(line: str) -> None:
    """Ranges, extras and markers would install another thing tomorrow or elsewhere."""
    with pytest.raises(ValueError, match="does not pin one version exactly"):
        parse_pins(f"# a comment\nnumpy==2.4.6\n{line}\n")


@pytest.mark.slow
def test_an_installation_that_fails_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What pip said last is the peer's reason; a half-made environment does not count as one."""
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "requirements.txt").write_text("torch==2.13.0\n")
    monkeypatch.setattr(environments, "HERE", tmp_path)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    said: list[str] = []
    with pytest.raises(PeerUnavailable, match=r"odd: cannot be installed: .*torch==2\.13\.0"):
        environments.make_environment("odd", said.append, tmp_path / "made")
    assert "installing 1 packages" in said[0]
    assert not environments.is_installed("odd", tmp_path / "made")


def test_java_is_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without Java, or with an old one, the reason is a command to type."""
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(PeerUnavailable, match="found none: apt-get install openjdk-17-jre-headless"):
        servers.require_java()
    old = tmp_path / "java"
    old.write_text("""#!/bin/sh\necho 'openjdk version "1.8.0_392"' >&2\n""")
    old.chmod(0o755)
    with pytest.raises(PeerUnavailable, match="found 1: apt-get"):
        servers.require_java()


@pytest.mark.slow
def test_peers_compute_what_we_compute(tmp_path: Path) -> None:
    """The network in the peers' handlers, written without ours, gives our reference's numbers from the same weights."""
    models = write_models(tmp_path, 2)
    assert sorted(path.name for path in models.store.iterdir()) == ["m0.mar", "m1.mar"]
    assert not np.allclose(models.answers["m0"], models.answers["m1"])
    threads = torch.get_num_threads()
    for name, wanted in models.answers.items():
        network = load_network(str(models.weights / name))
        torch.set_num_threads(threads)
        with torch.inference_mode():
            got = network(torch.from_numpy(models.x)[None]).numpy().ravel()
        assert sum(each.numel() for each in network.parameters()) == 17_528
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


FAMILY = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
print("ready", flush=True)
time.sleep(60)
"""


@pytest.mark.slow
def test_a_tree_is_ended_with_whoever_left_its_group(tmp_path: Path) -> None:
    """A daemon in a session of its own, even stopped, is seen, measured and gone after the block, which raises."""
    trees: list[ProcessTree] = []

    def fail() -> None:
        with start_process([sys.executable, "-c", FAMILY], tmp_path, {}) as (tree, log):
            trees.append(tree)
            wait_until(lambda: "ready" in log.read_text())
            assert len(tree.pids()) == 2
            assert tree.memory() > 2e6
            assert tree.cpu_s() >= 0
            tree.signal(signal.SIGSTOP)
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        fail()
    assert trees[0].pids() == []


def test_growth_stops_where_a_model_is_refused() -> None:
    """What was loaded until then counts, and the server's words are kept; else it ends with models or budget."""
    with serve_site(Site(refuses="m2")) as there:
        server = PeerServer("site", there.url, DIALECTS["mms"], "", ProcessTree(os.getpid()))
        growth = grow_past_memory(server, ["m0", "m1", "m2", "m3"], b"{}", float("inf"))
        assert growth.models == 2
        assert growth.refused.startswith("site answered 503 for m2")
        assert "2 more models took" in str(growth)
        assert "then refused: site answered 503" in str(growth)
        assert grow_past_memory(server, ["m0", "m1"], b"{}", float("inf")).models == 2
        assert grow_past_memory(server, ["m0", "m1"], b"{}", -1e9).models == 0
    assert grow_past_memory(server, ["m0"], b"{}", float("inf")).refused


@contextmanager
def _serve(name: str, there: Site, *, fixed: bool = False) -> Iterator[PeerServer]:
    yield PeerServer(name, there.url, DIALECTS["ray"], "", ProcessTree(os.getpid()), fixed=fixed)


def _is_absent() -> AbstractContextManager[PeerServer]:
    raise PeerUnavailable("needs Java 17")


@NEEDS_WRK
@pytest.mark.slow
def test_who_answers_wrongly_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong numbers, a failed start or refusals in a later round end a peer's part, with the reason; others go on."""
    monkeypatch.setattr(comparison, "WARM_S", 1)
    monkeypatch.setattr(comparison, "IDLE_S", 0.01)
    monkeypatch.setattr(comparison, "BURNS", float("inf"))  # their tree is this process
    monkeypatch.setattr(comparison, "CONNECTIONS", (8,))

    with ExitStack() as stack:
        there = PeerComparison(write_models(tmp_path, 2), tmp_path, stack)
        answers = {name: answer.tolist() for name, answer in there.models.answers.items()}
        right = stack.enter_context(serve_site(Site(answers)))
        later = stack.enter_context(serve_site(Site(answers)))
        wrong = stack.enter_context(serve_site(Site({"m0": answers["m0"], "m1": answers["m0"]})))
        there.enter(OURS, "1", partial(_serve, OURS, right), 2)
        there.enter("absent", "1", _is_absent, 2)
        there.enter("wrong", "1", partial(_serve, "wrong", wrong), 2)
        there.enter("fixed", "1", partial(_serve, "fixed", wrong, fixed=True), 1)
        there.enter("later", "1", partial(_serve, "later", later), 2)
        assert list(there.contenders) == [OURS, "fixed", "later"]
        there.settle()
        for turn in there.play(1, 1):
            later.refuses = "m1" if turn == (0, "later", 8) else ""
        assert there.lost["absent"] == "needs Java 17"
        assert there.lost["wrong"].startswith("wrong answers")
        assert "requests failed" in there.lost["later"]
        found = there.results()
        assert list(found) == [OURS, "fixed"]
        assert found["fixed"]["8 connections"][f"{OURS} / it"]["requests_per_s"]["runs"] == 1
        assert "load_ms" in found[OURS]
        assert "load_ms" not in found["fixed"]
        with pytest.raises(RuntimeError), there.risking(OURS):
            raise RuntimeError("ours must not fail unnoticed")

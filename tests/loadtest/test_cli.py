"""The command that loads a fleet, and its results."""

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trustme
from rich.console import Console
from typer.testing import CliRunner

from loadtest.cli import app
from loadtest.cli_groups import BENCHMARKS, DEMOS, CommandModule
from loadtest.driver import run, run_result, summary
from loadtest.driver.call_encodings import Encoding
from loadtest.driver.profiles import ArrivalProcess, Profile, Schedule, Tick
from loadtest.driver.request_bodies import RequestBody
from loadtest.driver.run import RequestSource, RunPlan, ServerUnderLoad, climb_rates
from loadtest.driver.run_result import Run
from loadtest.driver.trace import read_trace
from loadtest.fleets.fleet import list_fleet_names, make_fleet
from loadtest.fleets.network_shape import make_request
from loadtest.observe.local_server import run_local_server
from loadtest.observe.processes import find_free_port
from loadtest.observe.server_access import ServerAccess, open_access
from loadtest.plan.cli import make_unloader
from tests.e2e.models import FORECAST_TCN, pack_forecaster
from tests.loadtest.peer import Peer, run_peer
from tests.loadtest.runs import PROGRESS_LINE
from tests.patience import PATIENCE_S

ROOT = Path(__file__).parents[2]
GROUPS = {"bench": BENCHMARKS, "demo": DEMOS}
console = Console()


def fleetcast_load(folder: Path, *flags: str) -> "subprocess.CompletedProcess[str]":
    """The command, in a folder of its own."""
    command = [sys.executable, "-m", "loadtest.cli", *flags]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.e2e
def test_a_fleet_of_its_own(tmp_path: Path) -> None:
    """From an empty folder to percentiles, hits, loads, memory, file, page, trace; the exit code is the verdict."""
    flags = ["--models", "12", "--resident", "4", "--rate", "100", "--seconds", "1", "--warmup", "0.5"]
    outputs = ["--out", "run.json", "--html", "run.html", "--trace-out", "run.csv"]
    found = fleetcast_load(tmp_path, "run", *flags, *outputs, "--hit-ratio", "0.01")
    valid = "valid the driver kept its schedule" in found.stdout
    assert found.returncode == (0 if valid else 1), found.stderr
    assert all(re.match(PROGRESS_LINE, line) for line in found.stderr.splitlines()), found.stderr
    rows = {name: int(n) for name, n in re.findall(r"│ (all|hit|miss|coalesced) +│ +(\d+) │", found.stdout)}
    assert rows["all"] == sum(rows.values()) - rows["all"] > 50
    assert rows["miss"] > 10
    ratio = f"{rows['hit'] / rows['all']:.3f}"
    assert re.findall(r"hit ratio(?: by /metrics)? +│ (0\.\d{3}) ", found.stdout) == [ratio, ratio]
    assert re.search(r"loads from disk +│ \d+, [\d.]+ ms each", found.stdout)
    assert re.search(r"memory of worker 0 +│ \d{2,3}\.\d MB", found.stdout)
    results = json.loads((tmp_path / "run.json").read_text())["results"]
    assert sum(results["over_time"]["due_per_s"]) / 2 == pytest.approx(rows["all"])
    assert sum(sum(tier["count"]) for tier in results["load_time"].values()) == rows["miss"]
    assert results["slo"]["checks"][0]["met"]
    assert "<html" in (tmp_path / "run.html").read_text()
    trace = read_trace(tmp_path / "run.csv")
    assert len(trace.time) == rows["all"]


@pytest.mark.e2e
def test_your_own_archives(tmp_path: Path) -> None:
    """A store alone is enough: each archive is asked what it takes; a replay of the run asks the same models again."""
    make_fleet(str(tmp_path / "models"), 6)
    (tmp_path / "models" / "broken.mar").write_bytes(b"no archive")
    flags = ["--store", "models", "--warmup", "0"]
    outputs = ["--trace-out", "t.csv", "--out", "a.json"]
    found = fleetcast_load(tmp_path, "run", *flags, "--cache", "8MiB", "--seconds", "0.5", *outputs)
    assert "1 of 7 archives are left out:" in found.stdout
    assert "broken.mar: " in found.stdout
    assert "failed" not in found.stdout
    again = fleetcast_load(tmp_path, "run", *flags, "--profile", "replay", "--trace", "t.csv", "--out", "b.json")
    assert "failed" not in again.stdout
    first, second = (json.loads((tmp_path / file).read_text())["results"] for file in ("a.json", "b.json"))
    assert first["requests"] == second["requests"]
    drawn = fleetcast_load(tmp_path, "report", "a.json", "b.json", "--html", "ab.html")
    assert (drawn.returncode, drawn.stderr) == (0, "")
    assert (tmp_path / "ab.html").stat().st_size > 10_000


@pytest.mark.e2e
def test_a_server_that_runs(tmp_path: Path) -> None:
    """The names come from the store; without --metrics-url the server's own figures are left out."""
    make_fleet(str(tmp_path), 3)
    with run_local_server(str(tmp_path), ["--workers", "1"]) as server:
        flags = ["--url", server.inference, "--store", str(tmp_path), "--seconds", "0.5", "--warmup", "0"]
        found = CliRunner().invoke(app, ["run", *flags])
    assert "3 models at" in found.stdout
    assert re.search(r"miss +│ +3 ", found.stdout)
    assert "failed" not in found.stdout
    assert "/metrics" not in found.stdout


@pytest.mark.e2e
def test_other_servers_clients(tmp_path: Path) -> None:
    """In the protocols of KServe and of TorchServe with versions, and as SageMaker's platform asks a container."""
    make_fleet(str(tmp_path / "models"), 3)
    (tmp_path / "names.txt").write_text("au/nowhere.mar\n")
    (tmp_path / "body.json").write_text('{"inputs": []}')
    short = ["--store", str(tmp_path / "models"), "--seconds", "0.5", "--warmup", "0"]
    with run_local_server(str(tmp_path / "models"), ["--workers", "1"]) as server:
        url = ["--url", server.inference, "--protocol"]
        for given in (["v2", "--body", "binary"], ["torchserve", "--versions", "--management-url", server.management]):
            found = CliRunner().invoke(app, ["run", *url, *given, *short])
            assert re.search(r"sound answers +│ ([1-9]\d*) of \1 ", found.stdout), found.output
            assert "failed" not in found.stdout
            assert found.stdout.splitlines()[0].endswith(", by version" if "torchserve" in given else server.inference)
        names = ["--names", str(tmp_path / "names.txt"), "--request", str(tmp_path / "body.json")]
        found = CliRunner().invoke(app, ["run", *url, "v2", *short, *names])
        said = " ".join(found.stdout.replace("│", " ").split())
        assert "failed: status 404, no such model or version" in said
        assert re.search(r"status 404 said .*au/nowhere\.mar", said), said
    found = CliRunner().invoke(app, ["run", "--protocol", "container", *short, "--cache", "64MiB"])
    assert "3 of them loaded into the container" in " ".join(found.stdout.split())
    assert re.search(r"sound answers +│ ([1-9]\d*) of \1 ", found.stdout), found.output


@pytest.mark.e2e
def test_calls_by_grpc(tmp_path: Path) -> None:
    """Tensors and forecasts, at a started server and at one that runs; refusals have gRPC's names and our words."""
    store = tmp_path / "models"
    make_fleet(str(store), 3)
    (store / "forecasts.mar").write_bytes(pack_forecaster("f", 1, config=FORECAST_TCN, forecast=True).data)
    (tmp_path / "names.txt").write_text("au/nowhere.mar\n")
    (tmp_path / "forecasts.txt").write_text("forecasts.mar\n")
    (tmp_path / "body.json").write_text('{"inputs": [{"name": "x", "shape": [1], "datatype": "FP32", "data": [1]}]}')
    short = ["--protocol", "grpc", "--store", str(store), "--rate", "100", "--seconds", "0.5", "--warmup", "0"]
    started = CliRunner().invoke(app, ["run", *short, "--cache", "64MiB", "--body", "binary"])
    assert re.search(r"sound answers +│ ([1-9]\d*) of \1 ", started.stdout), started.output
    assert re.search(r"miss +│ +4 ", started.stdout), started.output
    assert "failed" not in started.stdout
    with run_local_server(str(store), ["--workers", "1", "--grpc-port", "0"]) as server:
        forecasts = ["--body", "deepar", "--names", str(tmp_path / "forecasts.txt")]
        found = CliRunner().invoke(app, ["run", "--url", server.grpc, *short, *forecasts])
        assert re.search(r"sound answers +│ ([1-9]\d*) of \1 ", found.stdout), found.output
        assert "failed" not in found.stdout
        names = ["--names", str(tmp_path / "names.txt"), "--request", str(tmp_path / "body.json")]
        found = CliRunner().invoke(app, ["run", "--url", server.grpc, *short, *names])
        said = " ".join(found.stdout.replace("│", " ").split())
        assert "failed: status NOT_FOUND, no such model or version" in said, said
        assert re.search(r"status NOT_FOUND said .*au/nowhere\.mar", said), said
    gone = CliRunner().invoke(app, ["run", "--url", server.grpc, *short])
    assert gone.exit_code == 1
    assert "nobody listens at 127.0.0.1:" in gone.output


@pytest.fixture
def protected(tmp_path: Path) -> Mapping[str, list[str]]:
    """Flags of a server with mutual TLS and tokens, and of the load tester for it."""
    ca, files = trustme.CA(), {name: str(tmp_path / name) for name in ("ca.pem", "server.pem", "desk.pem", "token")}
    ca.cert_pem.write_to_path(files["ca.pem"])
    ca.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(files["server.pem"])
    ca.issue_cert("desk@example.org").private_key_and_cert_chain_pem.write_to_path(files["desk.pem"])
    Path(files["token"]).write_text("desk-secret\n")
    tokens = tmp_path / "tokens.toml"
    digest = hashlib.sha256(b"desk-secret").hexdigest()
    scopes = '["invoke", "manage", "metrics"]'
    tokens.write_text(f'[[tokens]]\nname = "desk"\nsha256 = "{digest}"\nscopes = {scopes}\n')
    serve = ["--tls-certificate", files["server.pem"], "--tls-client-ca", files["ca.pem"], "--tokens", str(tokens)]
    shown = ["--ca", files["ca.pem"], "--client-cert", files["desk.pem"]]
    return {"serve": serve, "shown": shown, "token": ["--token-file", files["token"]]}


@pytest.mark.e2e
def test_a_server_with_tls_and_tokens(tmp_path: Path, protected: Mapping[str, list[str]]) -> None:
    """Driver and metrics show certificate and token; without one, or at a plain address, one line says what to give."""
    models = tmp_path / "models"
    names = make_fleet(str(models), 3)
    serve = ["--workers", "1", "--grpc-port", "0", *protected["serve"]]
    with run_local_server(str(models), serve, stderr=subprocess.DEVNULL) as server:
        assert server.inference.startswith("https://")
        flags = ["--store", str(models), "--seconds", "0.5", "--warmup", "0"]
        both = ["--url", server.inference, "--metrics-url", server.metrics, *flags]
        for dialect in ("sagemaker", "forecasts", "grpc"):
            address = ["--url", server.grpc] if dialect == "grpc" else []
            whole = [*both, *address, *protected["shown"], *protected["token"], "--dialect", dialect]
            found = CliRunner().invoke(app, ["run", *whole])
            assert "failed: " not in found.stdout, found.stdout
            assert re.search(r"sound answers +│ ([1-9]\d*) of \1 ", found.stdout), found.stdout
            assert re.search(r"hit ratio by /metrics +│ ", found.stdout)
        for given, said in (
            ([*both, *protected["token"]], "--ca FILE"),
            ([*both, *protected["shown"][:2], *protected["token"]], "--client-cert FILE"),
            ([*both, *protected["shown"]], "answered 401 (the server wants a token that it knows: --token-file)"),
            (["--url", server.inference.replace("https", "http"), *flags], "give its address with https"),
        ):
            refused = CliRunner().invoke(app, ["run", *given])
            assert refused.exit_code == 1
            assert said in refused.output.splitlines()[-1]
        unknown = CliRunner().invoke(app, ["run", "--url", server.inference, *flags, *protected["shown"]])
        assert "failed: status 401, the server wants a token that it knows: --token-file" in " ".join(
            unknown.stdout.replace("│", " ").split()
        )
        _, ca, _, cert = protected["shown"]
        access = open_access(Path(ca), Path(cert), None, Path(protected["token"][1]))
        unload = make_unloader(server.management, names, access)
        unload(0)
        with pytest.raises(RuntimeError, match="answered 401"):
            make_unloader(server.management, names, ServerAccess(Path(ca), Path(cert)))(0)


@pytest.mark.e2e
@pytest.mark.parametrize("encoding", Encoding)
def test_calls_for_many_models(encoding: Encoding, tmp_path: Path) -> None:
    """A tick as a few calls: each waits for its own models; one that is not there fails in every call that names it."""
    if encoding is Encoding.ARROW:
        pytest.importorskip("pyarrow")
    make_fleet(str(tmp_path / "store"), 4)
    names = [f"{name}\n" for name in list_fleet_names(4)]
    (tmp_path / "names").write_text("".join([*names[:2], "none.mar\n", *names[2:]]))
    (tmp_path / "request.json").write_text(json.dumps(make_request(0)))
    out, html = tmp_path / "run.json", tmp_path / "run.html"
    with run_local_server(str(tmp_path / "store"), ["--workers", "1"]) as server:
        flags = ["--url", server.inference, "--names", str(tmp_path / "names"), "--seconds", "1", "--warmup", "0"]
        flags += ["--request", str(tmp_path / "request.json"), "--out", str(out), "--html", str(html)]
        tick = ["--profile", "tick", "--every-s", "0.1", "--spread-s", "0.05"]
        calls = ["--dialect", "forecasts", "--per-call", "2", "--failed", "0.1", "--encoding", encoding]
        found = CliRunner().invoke(app, ["run", *flags, *tick, *calls])
    results = json.loads(out.read_text())["results"]
    assert (results["requests"], results["checked"], results["unsound"]) == (30, 30, []), found.output
    counted = {key: results["forecasts"][key] for key in ("calls", "asked", "failed")}
    assert (counted, results["encoding"]) == ({"calls": 30, "asked": 50, "failed": 10}, encoding)
    assert results["latency"]["miss"]["count"] >= 2
    assert results["latency"]["hit"]["count"] > 10
    assert results["slo"]["checks"][0] == {
        "what": "failed forecasts", "limit": "at most 10.0000%", "found": "20.0000%", "met": False
    }  # fmt: skip
    assert found.exit_code == 1
    assert re.search(r"failed forecasts +│ 10 of 50, in 30 calls ", found.output)
    assert f"calls for 2 models as {encoding.upper()}" in found.output
    assert "10 of 50 forecasts failed." in html.read_text()


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (["--url", "http://127.0.0.1:1"], "the models' names are not known: give --store or --names"),
        (["--metrics-url", "http://127.0.0.1:1"], "--metrics-url and --names are for the server at --url"),
        (["--cache", "1MiB"], "--cache goes with --store"),
        (["--store", ".", "--token-file", "names.txt"], "--token-file are for the server at --url"),
        (["--url", "http://127.0.0.1:1", "--store", ".", "--token-file", "names.txt"], "must hold a token alone"),
        (["--url", "http://127.0.0.1:1", "--store", ".", "--ca", "names.txt"], "are for addresses with https"),
        (["--url", "https://127.0.0.1:1", "--store", ".", "--ca", "names.txt"], "--ca names.txt: "),
        (["--url", "https://127.0.0.1:1", "--store", ".", "--client-key", "names.txt"], "needs --client-cert"),
        (["--url", "http://192.0.2.7", "--store", "."], "192.0.2.7 is 192.0.2.7, not this machine"),
        (["--url", "http://127.0.0.1:1", "--store", "nowhere"], "nowhere"),
        (["--url", "http://127.0.0.1:1", "--store", ".", "--metrics-url", "http://127.0.0.1:1"], "refused"),
        (["--url", "http://127.0.0.1:1", "--store", ".", "--profile", "tick", "--rate", "3"], "tick takes no rate"),
        (["--url", "http://127.0.0.1:1", "--store", ".", "--profile", "replay"], "give it a trace"),
        (["--url", "http://127.0.0.1:1", "--names", "names.txt"], "give a --request"),
        (["--store", "empty"], "no model of empty can be asked: it has no archive"),
        (["--rate", "-5"], "rate"),
        (["--store", ".", "--request", "names.txt", "--url", "http://no.such.host.invalid"], "not known here"),
        (["--url", "http://127.0.0.1:1", "--store", ".", "--per-call", "3"], "--per-call is for the dialect forecasts"),
        (["--store", ".", "--encoding", "npy"], "--encoding npy is of calls for many models"),
        (["--store", ".", "--dialect", "forecasts", "--trace-out", "t.csv"], "do not go with calls for many"),
        (
            ["--url", "http://127.0.0.1:1", "--store", ".", "--dialect", "forecasts", "--body", "npy"],
            "is not asked for one forecast",
        ),
        (["--store", ".", "--protocol", "v2", "--versions"], "--versions is for the protocol torchserve"),
        (["--url", "http://127.0.0.1:1", "--store", ".", "--allow-code", "a"], "is of a server that is started"),
        (["--store", ".", "--management-url", "http://127.0.0.1:1"], "--management-url is of the server at --url"),
        (["--store", ".", "--protocol", "v2", "--body", "npy"], "no model of . can be asked"),
        (["--store", ".", "--body", "binary"], "no model of . can be asked"),
        (["--store", ".", "--dialect", "esperanto"], "known dialects are sagemaker, forecasts, "),
    ],
)
def test_flags_that_cannot_be(flags: list[str], why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line says why there is no load: no names, an address beyond this machine, no store, no metrics ..."""
    monkeypatch.chdir(tmp_path)
    make_fleet(".", 1)
    (tmp_path / "empty").mkdir()
    (tmp_path / "names.txt").write_text("a.mar\n\nb.mar\n")
    found = CliRunner().invoke(app, ["run", *flags, "--warmup", "0"])
    assert found.exit_code == 1
    line = found.output.splitlines()[-1]
    assert line.startswith("no load: ")
    assert why in line


def make_subject(peer: Peer, model: str) -> ServerUnderLoad:
    """A peer to be asked for one model."""
    questions = RequestSource([model], 1, None, RequestBody(b"{}"), 0).of(None, console)  # type: ignore[list-item]
    return ServerUnderLoad(f"http://127.0.0.1:{peer.port}", None, questions, "a peer")


@pytest.mark.slow
def test_a_ramp_ends_where_answers_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rate after rate while they are sustained; the table says at which it was too much, and why."""
    monkeypatch.setattr(run_result, "MAX_LAG_S", PATIENCE_S)  # the ramp is judged here, not how busy this machine is
    monkeypatch.setattr(run, "SUSTAINED", 0.5)  # nor how long the last answers of half a second take
    with run_peer(Peer(stall_at=130, stall_s=4.0)) as peer:
        plan = RunPlan(Profile(1, arrivals=ArrivalProcess.CONSTANT), 0.5, 0.0, 512, 1, summary.Slo(p99_ms=2000.0))
        to = make_subject(peer, "hit").target("sagemaker", allow_remote=False)
        found, _ = climb_rates(make_subject(peer, "hit"), plan, to, [100.0, 200.0, 400.0], console)
    steps = found["steps"]
    assert [step["sustained"] for step in steps] == [True, False]
    assert steps[1]["why"].startswith("p99 latency ")
    assert found["requests"] == 50  # the sustained one is shown


def test_a_ramp_is_of_rates() -> None:
    """A tick has no rate to raise."""
    plan = RunPlan(Tick(1), 0.5, 0.0, 512, 1, summary.Slo())
    with run_peer(Peer()) as peer, pytest.raises(ValueError, match="a ramp is of rates"):
        climb_rates(
            make_subject(peer, "hit"),
            plan,
            make_subject(peer, "hit").target("sagemaker", allow_remote=False),
            [1.0],
            console,
        )


def test_the_verdict() -> None:
    """Each limit is met or missed by itself; an invalid run meets nothing; without limits there is no verdict."""
    found: dict[str, Any] = {
        "latency": {"all": {"p50_ms": 1.0, "p99_ms": 30.0}},
        "failures": {"status 503": 1},
        "requests": 1000,
        "hit_ratio": 0.9,
        "invalid": [],
    }
    assert summary.Slo().verdict(found) is None
    verdict = summary.Slo(p50_ms=1.0, p99_ms=29.9, failed=0.001, hit_ratio=0.91).verdict(found)
    assert verdict is not None
    assert [check["met"] for check in verdict["checks"]] == [True, False, True, False]
    assert verdict["checks"][2]["limit"] == "at most 0.1000%"
    assert not verdict["met"]
    good = summary.Slo(p50_ms=1.0).verdict(found)
    assert good is not None
    assert good["met"]
    bad = summary.Slo(p50_ms=1.0).verdict({**found, "invalid": ["late"]})
    assert bad is not None
    assert not bad["met"]


def test_curves_over_time() -> None:
    """Rates, percentiles and hits stand at the time when requests were due; where none was, nothing is said."""
    at = np.array([0.0, 0.1, 0.2, 0.3, 1.6, 1.7])
    status, cache = np.array([200, 200, 200, 503, 200, 0]), np.array([1, 2, 1, 0, 1, 0])
    done = np.where(status > 0, at + 0.010, np.nan)
    run = Run(Schedule(at, np.zeros(6, np.int64), 2.0), at, at, done, status, cache, 3.7, False, 0, [])
    found = summary.compute_curves(run)
    assert found["t_s"] == [0.25, 0.75, 1.25, 1.75]
    assert found["due_per_s"] == [8.0, 0.0, 0.0, 4.0]
    assert found["answered_per_s"] == [6.0, 0.0, 0.0, 2.0]
    assert found["failed_per_s"] == [2.0, 0.0, 0.0, 2.0]
    assert found["p50_ms"] == [10.0, None, None, pytest.approx(1005)]
    assert found["max_ms"] == [10.0, None, None, 2000.0]
    assert found["hit_ratio"] == [pytest.approx(2 / 3), None, None, 1.0]


def test_a_distribution_is_what_was_measured() -> None:
    """Percentiles to three digits, from a microsecond to an hour."""
    seconds = np.random.default_rng(0).lognormal(-6, 2, 20_000)
    found = summary.compute_distribution(seconds)
    for percentile in summary.PERCENTILES:
        low, high = (np.percentile(seconds, percentile, method=method) * 1e3 for method in ("lower", "higher"))
        assert low * 0.998 - 0.001 <= found[f"p{percentile:g}_ms"] <= high * 1.002 + 0.001
    assert found["max_ms"] == seconds.max() * 1e3
    assert found["count"] == 20_000
    assert summary.compute_distribution(np.array([1e-9, 1e5]))["count"] == 2


def test_the_slowest_over_time() -> None:
    """Every request is in the span in which it was due; spans without requests are blank, the rest on a log scale."""
    at, latency = np.array([0.0, 0.5, 59.999]), np.array([0.001, 0.010, 0.100])
    slots = summary.compute_slowest(at, latency, 60.0)
    assert [slots[0], slots[-1], sum(slots)] == [10.0, 100.0, 110.0]
    assert summary.draw_sparkline([1.0, 0.0, 10.0, 100.0]) == "▁ ▅█"
    assert summary.draw_sparkline([0.0]) == " "


@pytest.mark.slow
def test_no_server_is_no_load(tmp_path: Path) -> None:
    """An address nobody listens on is said in a line, not blamed on the driver."""
    make_fleet(str(tmp_path / "store"), 1)
    address = f"http://127.0.0.1:{find_free_port()}"
    done = fleetcast_load(tmp_path, "run", "--url", address, "--store", str(tmp_path / "store"), "--seconds", "1")
    assert done.returncode == 1
    assert "no load: " in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("group", "commands"), GROUPS.items())
def test_the_groups_list_their_commands(group: str, commands: Mapping[str, CommandModule]) -> None:
    """Every entry of the tables is a command, listed with its line, in the order of the table."""
    listed = CliRunner().invoke(app, [group, "--help"], env={"COLUMNS": "200"})
    assert listed.exit_code == 0
    assert re.findall(r"^  ([a-z][a-z-]+) {2,}", listed.output, re.MULTILINE) == list(commands)
    assert all(lazy.about in " ".join(listed.output.split()) for lazy in commands.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("group", "name", "module"),
    [(group, name, lazy.module) for group, table in GROUPS.items() for name, lazy in table.items()],
)
def test_every_command_has_help(group: str, name: str, module: str) -> None:
    """Its module imports and has a Typer; `--help` is the module's docstring and its options, and runs nothing."""
    shown = CliRunner().invoke(app, [group, name, "--help"], env={"COLUMNS": "200"})
    assert shown.exit_code == 0, shown.output
    docstring = import_module(f"loadtest.{module}").__doc__
    assert docstring is not None
    assert " ".join(docstring.split()[:8]) in " ".join(shown.output.split())
    assert "--help" in shown.output

"""Fleetcast on Ray beside Ray's own `@serve.multiplexed`: the same weights, the same body, in one run. Needs wrk.

Contenders: Ray Serve as it comes, and in its best shape (HAProxy, throughput options, ONNX Runtime, raw bodies);
`fleetcast cluster` by its fronts (direct), and through Ray's proxy; and Ray's own bare deployment, which has one model
and no multiplexing. Each has one replica on this host. In each round every contender is started, measured and ended, in
rotating order, since Ray's processes use the machine when they idle; the bare one takes the place of Ray's default in
its processes. Measured: a warm load at 1, 8 and 32 connections, 100 models that nothing has asked before at once, a
tick of 500 models over 32 connections, and the memory by which the processes grow for these models. At last cold models
whose store answers after 25 ms (all others are on the disk), and the hit ratios at equal memory (`ray_hits`). Five
rounds save a record, anew after each part, so that a break loses the part alone. No round is begun that would not end
within `--minutes`. The first run installs Ray with pip.
"""

import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt
import typer
from rich.console import Console

from loadtest import record
from loadtest.benchmarks import ray_hits
from loadtest.benchmarks.ray_results import (
    BARE,
    CONNECTIONS,
    DIRECT,
    PROXY,
    RAY,
    RAY_BEST,
    build_table,
    judge_goals,
    list_goals,
    summarise_contenders,
    summarise_rounds,
)
from loadtest.driver import wrk
from loadtest.driver.dialects import DIALECTS
from loadtest.observe.processes import find_free_port
from loadtest.peers.answers import decode_answer
from loadtest.peers.burst import ask_at_once, read_body
from loadtest.peers.comparison import CLOSE, SEED, Models, write_models
from loadtest.peers.comparison_table import order_turns
from loadtest.peers.distant_store import BUCKET, CREDENTIALS, serve_distant
from loadtest.peers.environments import find_requirements, make_environment, parse_pins
from loadtest.peers.graphs import export_graph
from loadtest.peers.network import load_network
from loadtest.peers.peer_server import PeerServer
from loadtest.peers.process_tree import ProcessTree, read_log_end, start_process
from loadtest.peers.servers import start_best_ray, start_ray
from server.contract import JSON

BARE_RUNS = ".runs"  #: suffix of what `peers/ray/handler.py` writes
RECORDED = 5  #: least number of rounds of a record
WARM_MODELS, COLD_MODELS, TICK_MODELS = 8, 100, 500
TICK_CONNECTIONS = 32
START_S = 300.0
LAST_S = 150.0  #: left of the minutes for what follows the rounds
DISTANT_S = 0.025  #: by which a store answers later, as one in the same region does
DISTANT_BURSTS = 5  #: of COLD_MODELS each
SETTLE_S, IDLE = 15.0, 0.2  #: how long a server may take until it uses no more of a core than this
ROOT = Path(__file__).parents[2]
CONTENDERS = (DIRECT, PROXY, RAY, RAY_BEST)  #: `BARE` is measured with `RAY`

CONSOLE = Console(width=None if sys.stdout.isatty() else 140)
Start = Callable[[], Any]
Found = dict[str, Any]

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def main(
    *,
    rounds: Annotated[int, typer.Option(min=1, help="number of rounds; fewer than 5 save no record")] = RECORDED,
    seconds: Annotated[int, typer.Option(min=1, help="duration of each of the three warm loads")] = 2,
    contenders: Annotated[str, typer.Option(help="whom to measure, comma-separated")] = ",".join(CONTENDERS),
    hits: Annotated[bool, typer.Option("--hits/--no-hits", help="also measure a distant store, and hit ratios")] = True,
    minutes: Annotated[float, typer.Option(min=1, help="no round is begun that would not end by then")] = 12.0,
) -> None:
    """Measure Fleetcast on Ray beside Ray's own multiplexing."""
    chosen = [name.strip() for name in contenders.split(",")]
    if unknown := [name for name in chosen if name not in CONTENDERS]:
        raise typer.BadParameter(f"there is no contender {', '.join(unknown)}: known are {', '.join(CONTENDERS)}")
    wrk.require_wrk()
    run = Run(chosen, seconds, saves=rounds >= RECORDED)
    until = time.monotonic() + 60 * minutes - (LAST_S if hits else 0)
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        models = write_models(folder, TICK_MODELS + COLD_MODELS)
        if RAY_BEST in chosen:
            for name in models.names:
                export_graph(load_network(str(models.weights / name)), models.weights / name / "model.onnx")
        for number in range(rounds):
            begin = time.monotonic()
            run.measure_round(number, models, folder)
            if number + 1 < rounds and time.monotonic() + (time.monotonic() - begin) > until:
                CONSOLE.print(f"{number + 1} of {rounds} rounds: another would not end within {minutes:g} minutes")
                break
        if hits:
            run.measure_distant(models)
            run.measure_hits(models)
    run.show()
    if any(not name.startswith("ray") for name in run.lost):
        raise typer.Exit(1)


class Run:
    """What was measured so far, and what was lost; saved after each part."""

    def __init__(self, chosen: Sequence[str], seconds: int, *, saves: bool) -> None:
        self._chosen, self._seconds, self._saves = chosen, seconds, saves
        self._before = record.describe_machine()
        self._rounds: list[dict[str, Found]] = []
        self._equal: Found = {}
        self._distant: Found = {}
        self._saved: Path | None = None
        self.lost: dict[str, str] = {}  #: by contender, why

    def __repr__(self) -> str:
        return f"<Run of {len(self._rounds)} rounds>"

    def measure_round(self, number: int, models: Models, folder: Path) -> None:
        """Each contender once, whatever becomes of the others."""
        self._rounds.append({})
        for name in order_turns(self._chosen, number):
            CONSOLE.print(f"round {number + 1}: {name}", highlight=False)
            bare = folder / f"bare-{number}" if name == RAY else None
            with self._noting_loss(name), _make_starter(name, models, bare)() as server:
                self._rounds[-1][name] = measure_contender(server, models, folder, self._seconds)
                if bare is not None:
                    with self._noting_loss(BARE):
                        put_bare_in_place(bare, server)
                        self._rounds[-1][BARE] = {"warm": measure_warm(server, models, folder, self._seconds)}
            self._save()

    def measure_distant(self, models: Models) -> None:
        """Cold models whose archives come from a store that is not on this host's disk."""
        with self._noting_loss("distant store"):
            self._distant = measure_distant(models)
        self._save()

    def measure_hits(self, models: Models) -> None:
        """The hit ratios at equal memory, where what Ray needs for a model is known."""
        costs = [each[RAY]["mb_per_model"] for each in self._rounds if RAY in each]
        if costs:
            with self._noting_loss("equal memory"):
                self._equal = measure_equal_memory(models, statistics.median(costs))
            self._save()

    def show(self) -> None:
        """The table, the goals, what was lost, and where the record is."""
        CONSOLE.print(build_table(summarise_contenders(self._rounds)))
        for line in (
            *list_goals(judge_goals(self._rounds, self._distant)),
            *([describe_equal_memory(self._equal)] if self._equal else []),
        ):
            CONSOLE.print(line, highlight=False)
        for name, why in self.lost.items():
            CONSOLE.print(f"{name} was lost: {why}", highlight=False)
        if self._saved is not None:
            CONSOLE.print(f"record: {self._saved}")

    @contextmanager
    def _noting_loss(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # servers may fail in any way; the others are measured all the same
            self.lost[name] = " ".join(str(error).split())[:500] or repr(error)
            CONSOLE.print(f"{name} was lost: {self.lost[name]}", highlight=False)

    def _save(self) -> None:
        if not self._saves:
            return
        results = {
            "ray": parse_pins(find_requirements("ray").read_text())["ray"],
            "rounds": len(self._rounds),
            "seconds": self._seconds,
            "models": {"warm": WARM_MODELS, "cold": COLD_MODELS, "tick": TICK_MODELS},
            "contenders": summarise_contenders(self._rounds),
            "goals": judge_goals(self._rounds, self._distant),
            "distant_store": self._distant,
            "equal_memory": self._equal,
            "unavailable": self.lost,
        }
        self._saved = record.save_record("ray", SEED, self._before, results)


def measure_contender(server: PeerServer, models: Models, folder: Path, seconds: int) -> Found:
    """Measure one that runs, once what it does at its start is over."""
    settle_server(server)
    body = server.dialect.tensor_body(models.x)
    check_answers(server, models, body)
    found: Found = {"memory_mb": server.tree.memory() / 1e6, "warm": measure_warm(server, models, folder, seconds)}
    names = models.names
    found["cold"] = ask_models(server, models, names[TICK_MODELS:], COLD_MODELS)
    before = server.tree.memory()
    for name in names[WARM_MODELS:TICK_MODELS]:
        server.ask(name, body)
    count = TICK_MODELS - WARM_MODELS
    found["mb_per_model"] = (server.tree.memory() - before) / 1e6 / count
    found["tick"] = ask_models(server, models, names[:TICK_MODELS], TICK_CONNECTIONS)
    return found


def measure_warm(server: PeerServer, models: Models, folder: Path, seconds: int) -> Found:
    """The load at each number of connections, after a second that does not count."""
    file = folder / "body.json"
    file.write_bytes(server.dialect.tensor_body(models.x))
    target = wrk.WrkTarget(server.name, server.url, WARM_MODELS, server.suffix, file, JSON, server.dialect)
    wrk.run_wrk(target, CONNECTIONS[-1], 1)
    found = {}
    for connections in CONNECTIONS:
        ran = wrk.run_wrk(target, connections, seconds)
        found[str(connections)] = {"rps": ran.requests_per_s, "p50_ms": ran.p50_ms, "p99_ms": ran.p99_ms}
    return found


def put_bare_in_place(trigger: Path, server: PeerServer) -> None:
    """Have Ray's handler end its application and run the bare one. Raises RuntimeError."""
    trigger.touch()
    until = time.monotonic() + START_S
    while not trigger.with_suffix(BARE_RUNS).exists():
        if not server.tree.pids() or time.monotonic() > until:
            raise RuntimeError("Ray did not start its bare deployment")
        time.sleep(0.1)


def settle_server(server: PeerServer) -> None:
    """Wait until its processes do little by themselves, or have had time enough for it."""
    until, before = time.monotonic() + SETTLE_S, server.tree.cpu_s()
    while time.monotonic() < until:
        time.sleep(1.0)
        before, passed = server.tree.cpu_s(), before
        if before - passed < IDLE:
            return


def measure_distant(models: Models) -> Found:
    """Bursts of cold models from a store whose answers take DISTANT_S, for Ray's default and Fleetcast's fronts."""
    CONSOLE.print(f"{COLD_MODELS} cold models at once, whose store answers after {DISTANT_S * 1e3:g} ms")
    bursts: dict[str, list[Found]] = {}
    for name in (RAY, DIRECT):
        with serve_distant(models.weights if name == RAY else models.store, DISTANT_S) as endpoint:
            address = {"AWS_ENDPOINT_URL": endpoint, **CREDENTIALS, "PEER_STORE": f"{endpoint}/{BUCKET}"}
            starter = (
                partial(start_ray, models.weights, CONSOLE.print, environment=address)
                if name == RAY
                else partial(start_cluster, f"s3://{BUCKET}", by_proxy=False, environment=address)
            )
            with starter() as server:
                settle_server(server)
                cuts = [models.names[each * COLD_MODELS :][:COLD_MODELS] for each in range(1 + DISTANT_BURSTS)]
                check_answers(server, models, server.dialect.tensor_body(models.x))
                bursts[name] = [ask_models(server, models, cut, COLD_MODELS) for cut in cuts[1:]]
    return {"delay_ms": DISTANT_S * 1e3, **{name: summarise_rounds(each) for name, each in bursts.items()}}


def measure_equal_memory(models: Models, mb_per_model: float) -> Found:
    """Give both caches the same bytes, and the same traces. `mb_per_model`: what one costs Ray's process."""
    most = ray_hits.count_models_of_ray(mb_per_model)
    names = models.names[:TICK_MODELS]
    traces = ray_hits.make_traces(names)
    CONSOLE.print(f"equal memory: {ray_hits.BUDGET} bytes, {most} models of Ray's", highlight=False)
    with start_ray(models.weights, CONSOLE.print, most) as server:
        body = server.dialect.tensor_body(models.x)
        served = ray_hits.HitServer(server, partial(ray_hits.count_loads_of_ray, server))
        rays = ray_hits.measure_hits(served, traces, body)
    port = find_free_port()
    with start_cluster(models.store, by_proxy=False, metrics_port=port, model_cache_bytes=ray_hits.BUDGET) as server:
        served = ray_hits.HitServer(server, partial(ray_hits.count_loads_of_ours, f"http://127.0.0.1:{port}"))
        ours = ray_hits.measure_hits(served, traces, server.dialect.tensor_body(models.x))
    asked = {"models": len(names), "requests": ray_hits.REQUESTS, "traces": ray_hits.TRACES, "zipf": ray_hits.ZIPF}
    return {"budget_bytes": ray_hits.BUDGET, **asked, "models_of_ray": most, "hit_ratio": {RAY: rays, DIRECT: ours}}


def describe_equal_memory(equal: Found) -> str:
    """Say both hit ratios in a line."""
    ratios = ", ".join(f"{name} {found['median']:.3f}" for name, found in equal["hit_ratio"].items())
    where = f"{equal['budget_bytes'] / 2**20:.0f} MiB for {equal['models']} models, Zipf {equal['zipf']:g}"
    return f"hit ratio at equal memory ({where}): {ratios}"


def check_answers(server: PeerServer, models: Models, body: bytes) -> None:
    """Compare the warm models' answers with the plain network's. Raises RuntimeError where one differs."""
    for name in islice(models.names, WARM_MODELS):
        check_answer(server, models, name, server.ask(name, body))


def check_answer(server: PeerServer, models: Models, name: str, got: npt.NDArray[np.float64]) -> None:
    """Raises RuntimeError where it differs from the plain network's."""
    if not np.allclose(got, models.answers[name], rtol=CLOSE, atol=CLOSE):
        raise RuntimeError(f"{server.name} answers {got[:3]} for {name}, not {models.answers[name][:3]}")


def ask_models(server: PeerServer, models: Models, names: Sequence[str], connections: int) -> Found:
    """Request each model once over so many connections: the time of all, and of each. Raises RuntimeError if wrong."""
    body = server.dialect.tensor_body(models.x)
    host, closing = urlsplit(server.url).netloc, {"Connection": "close"}
    requests = {name: server.dialect.request(host, name + server.suffix, body, headers=closing) for name in names}
    answers, whole_s = ask_at_once(server.url, requests, connections)
    for name, answer in answers.items():
        check_answer(server, models, name, decode_answer(read_body(answer.raw)))
    p50, p99 = np.percentile([answer.took_s * 1e3 for answer in answers.values()], [50, 99])
    return {"all_ms": whole_s * 1e3, "p50_ms": float(p50), "p99_ms": float(p99)}


def _make_starter(name: str, models: Models, bare: Path | None) -> Start:
    if name == RAY:
        return partial(start_ray, models.weights, CONSOLE.print, handler=("handler.py", str(bare)))
    if name == RAY_BEST:
        return partial(start_best_ray, models.weights, CONSOLE.print, "ingress")
    return partial(start_cluster, models.store, by_proxy=name == PROXY)


@contextmanager
def start_cluster(
    store: Path | str, *, by_proxy: bool, environment: Mapping[str, str] | None = None, **settings: Any
) -> Iterator[PeerServer]:
    """`fleetcast cluster` of one replica, in the peer's environment, which finds our packages behind its own."""
    python = make_environment("ray", CONSOLE.print) / "bin" / "python"
    asked = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    site = Path(subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip())
    (site / "fleetcast-behind.pth").write_text(sysconfig.get_path("purelib") + "\n")
    with tempfile.TemporaryDirectory(prefix="peer-") as text:
        folder, port, ray_port = Path(text), find_free_port(), find_free_port()
        flags = {
            "store": store, "replicas": 1, "cpus": 1, "device": "cpu", "inference-port": port, "management-port": 0,
            "metrics-port": 0, "ray-port": ray_port, "disk-cache": folder / "disk",
            **{name.replace("_", "-"): value for name, value in settings.items()},
        }  # fmt: skip
        line = [str(python), "-P", "-m", "server.cli.main", "cluster"]
        line += [part for flag, value in flags.items() for part in (f"--{flag}", str(value))]
        variables = {**_quiet(folder), "PYTHONPATH": str(ROOT), "RAY_TMPDIR": text, "RAY_AUTH_MODE": "disabled"}
        with start_process(line, folder, {**variables, **(environment or {})}) as (tree, log):
            _wait_until_ready(tree, log)
            at = ray_port if by_proxy else port
            yield PeerServer("fleetcast", f"http://127.0.0.1:{at}", DIALECTS["sagemaker"], ".mar", tree)


def _quiet(folder: Path) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if key in ("PATH", "LANG")}
    return {**kept, "HOME": str(folder), "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}


def _wait_until_ready(tree: ProcessTree, log: Path) -> None:
    until = time.monotonic() + START_S
    while "\nready " not in log.read_text(errors="replace"):
        if not tree.pids() or time.monotonic() > until:
            raise RuntimeError(f"fleetcast cluster did not start: {read_log_end(log)}")
        time.sleep(0.2)

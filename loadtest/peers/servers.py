"""Starts every server of the comparison on loopback: Fleetcast, the plain peer, and the others.

Each starter is a context manager that yields a `PeerServer`; it ends all its processes. Settings are what a user would
choose for small models on a small machine: one worker per model and one thread; all else is the default, except for
`start_best_ray`. What was chosen is in the server's `settings`. Triton and Mosec are in folders of their own.
"""

import json
import random
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from urllib.parse import urlencode

import torch

from loadtest.driver.dialects import DIALECTS
from loadtest.observe.local_server import LocalServer, run_local_server
from loadtest.observe.processes import find_free_port, is_reachable
from loadtest.peers.environments import HERE, PeerUnavailable, make_environment
from loadtest.peers.graphs import export_graph
from loadtest.peers.network import load_network
from loadtest.peers.peer_server import (
    LOAD_S,
    PeerServer,
    describe_settings,
    make_process_environment,
    post_accepted,
    wait_for_server,
)
from loadtest.peers.plain import FRONT, serve_plain
from loadtest.peers.plain_worker import OPENVINO
from loadtest.peers.process_tree import ProcessTree, start_process

JAVA = 17
UNBOUNDED = 100_000  #: most models of a Ray replica, more than any run has

Starter = Callable[..., AbstractContextManager[PeerServer]]


@contextmanager
def start_torchserve(models: Path, say: Callable[[str], None]) -> Iterator[PeerServer]:
    """TorchServe: a Java front and one Python process a model."""
    command = ["torchserve", "--foreground", "--ncs", "--disable-token-auth", "--enable-model-api", "--ts-config"]
    with _model_server("torchserve", models, say, command) as server:
        yield server


@contextmanager
def start_mms(models: Path, say: Callable[[str], None]) -> Iterator[PeerServer]:
    """Multi Model Server, TorchServe's ancestor: the same shape."""
    with _model_server("mms", models, say, ["multi-model-server", "--foreground", "--mms-config"]) as server:
        yield server


@contextmanager
def _model_server(name: str, models: Path, say: Callable[[str], None], command: list[str]) -> Iterator[PeerServer]:
    """Start either of the two: properties, archives made by their own archiver, a management listener."""
    require_java()
    binaries = make_environment(name, say) / "bin"
    with tempfile.TemporaryDirectory(prefix="peer-") as text:
        folder, base, management = Path(text), *(f"http://127.0.0.1:{_low_port()}" for _ in range(2))
        (folder / "archives").mkdir()
        (folder / "config.properties").write_text(_write_properties(name, base, management))
        arguments = [str(folder / "config.properties"), "--start", "--model-store", str(folder / "archives")]
        line = [str(binaries / command[0]), *command[1:], *arguments]
        environment = make_process_environment(binaries, folder)
        settings = describe_settings(folder, line, environment, config=_write_properties(name, base, management))
        with start_process(line, folder, environment) as (tree, log):
            wait_for_server(name, f"{base}/ping", tree, log)

            def prepare(model: str) -> None:
                _pack_peer_archive(name, binaries, models / model, folder / "archives")

            def register(model: str) -> None:
                query = {"url": f"{model}.mar", "model_name": model, "initial_workers": 1, "synchronous": "true"}
                post_accepted(name, f"{management}/models?{urlencode(query)}")

            yield PeerServer(name, base, DIALECTS[name], "", tree, prepare, register, settings=settings)


def _write_properties(name: str, base: str, management: str) -> str:
    """Write the configuration: listeners, one process per model, and queues for 32 connections."""
    lines = [f"inference_address={base}", f"management_address={management}"]
    lines += ["default_workers_per_model=1", "job_queue_size=1000"]
    if name == "torchserve":
        lines += [f"grpc_{listener}_port={find_free_port()}" for listener in ("inference", "management")]
        lines.append(f"metrics_address=http://127.0.0.1:{find_free_port()}")
    return "\n".join(lines) + "\n"


def _pack_peer_archive(name: str, binaries: Path, model: Path, archives: Path) -> None:
    """Pack a folder of weights and the handler with the peer's own archiver."""
    with tempfile.TemporaryDirectory(prefix="peer-") as text:
        shutil.copy(HERE / "network.py", text)
        shutil.copy(model / "weights.safetensors", text)
        options = ["--model-name", model.name, "--export-path", str(archives), "--force"]
        if name == "torchserve":
            files = f"{text}/network.py,{text}/weights.safetensors"
            command = ["torch-model-archiver", "--version", "1.0", "--handler", str(HERE / name / "handler.py")]
            command += ["--extra-files", files]
        else:
            shutil.copy(HERE / name / "handler.py", text)
            command = ["model-archiver", "--model-path", text, "--handler", "handler:handle", "--runtime", "python"]
        line = [str(binaries / command[0]), *command[1:], *options]
        done = subprocess.run(line, capture_output=True, text=True, check=False, timeout=LOAD_S)
        if done.returncode or not (archives / f"{model.name}.mar").exists():
            raise PeerUnavailable(f"{name}: {command[0]} failed: {done.stderr.strip()[-300:]}")


@contextmanager
def start_mlserver(models: Path, say: Callable[[str], None]) -> Iterator[PeerServer]:
    """MLServer: one Python process with all models in its event loop (its parallel workers die with uvloop 0.23)."""
    binaries = make_environment("mlserver", say) / "bin"
    with tempfile.TemporaryDirectory(prefix="peer-") as text:
        folder = Path(text)
        ports = {f"{listener}_port": find_free_port() for listener in ("http", "grpc", "metrics")}
        settings = {
            "host": "127.0.0.1",
            **ports,
            "parallel_workers": 0,
            "debug": False,
            "load_models_at_startup": False,
        }
        (folder / "settings.json").write_text(json.dumps({**settings, "model_repository_root": str(folder)}))
        for file in ("network.py", "mlserver/handler.py"):
            shutil.copy(HERE / file, folder)
        line, environment = [str(binaries / "mlserver"), "start", "."], make_process_environment(binaries, folder)
        told = describe_settings(folder, line, environment, config=json.dumps(settings))
        with start_process(line, folder, environment) as (tree, log):
            base = f"http://127.0.0.1:{ports['http_port']}"
            wait_for_server("mlserver", f"{base}/v2/health/live", tree, log)

            def prepare(model: str) -> None:
                (folder / model).mkdir(exist_ok=True)
                parameters = {"uri": str(models / model)}
                described = {"name": model, "implementation": "handler.MLServerModel", "parameters": parameters}
                (folder / model / "model-settings.json").write_text(json.dumps(described))

            def register(model: str) -> None:
                post_accepted("mlserver", f"{base}/v2/repository/models/{model}/load")

            yield PeerServer("mlserver", base, DIALECTS["v2"], "", tree, prepare, register, settings=told)


@contextmanager
def start_ray(
    models: Path,
    say: Callable[[str], None],
    most: int = UNBOUNDED,
    environment: Mapping[str, str] | None = None,
    handler: Sequence[str] = ("handler.py",),
) -> Iterator[PeerServer]:
    """Ray Serve: proxy, controller and one replica that multiplexes at most so many models.

    `environment`: Ray's own variables, which choose its shape. `handler`: the application, of those in `ray`, and what
    it takes besides.
    """
    binaries = make_environment("ray", say) / "bin"
    with tempfile.TemporaryDirectory(prefix="peer-") as text:
        folder, port = Path(text), find_free_port()
        for file in ("network.py", f"ray/{handler[0]}"):
            shutil.copy(HERE / file, folder)
        line = [
            str(binaries / "python"),
            handler[0],
            str(models),
            str(port),
            str(most),
            str(folder / "ray"),
            *handler[1:],
        ]
        variables = {**make_process_environment(binaries, folder), **(environment or {})}
        shown = [*line[:2], "MODELS", *line[3:]]
        with start_process(line, folder, variables) as (tree, log):
            wait_for_server("ray", f"http://127.0.0.1:{port}/-/routes", tree, log, "ready")
            settings = describe_settings(folder, shown, variables)
            yield PeerServer("ray", f"http://127.0.0.1:{port}", DIALECTS["ray"], "", tree, settings=settings)


@contextmanager
def start_best_ray(models: Path, say: Callable[[str], None], shape: str) -> Iterator[PeerServer]:
    """Ray Serve with HAProxy and its options for throughput; `shape`: see `ray/handler_best.py`."""
    with (
        tempfile.TemporaryDirectory(prefix="peer-") as text,
        start_ray(
            models, say, environment=write_best_variables(Path(text)), handler=("handler_best.py", shape)
        ) as server,
    ):

        def prepare(model: str) -> None:
            export_graph(load_network(str(models / model)), models / model / "model.onnx")

        yield replace(server, prepare=prepare)


def write_best_variables(folder: Path) -> dict[str, str]:
    """Write the variables for HAProxy and throughput; files and ports are its own, since Ray's defaults are shared."""
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(find_free_port()),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(find_free_port()),
    }


@contextmanager
def start_fleetcast(name: str, store: Path) -> Iterator[PeerServer]:
    """Fleetcast with its defaults."""
    with run_local_server(str(store)) as local:
        yield wrap_server(name, local)


def wrap_server(name: str, local: LocalServer) -> PeerServer:
    """Wrap a running Fleetcast server."""
    kinds = [each["kind"] for each in local.processes()]
    settings = {
        "command": "fleetcast serve (defaults)",
        "fronts": kinds.count("front"),
        "workers": kinds.count("worker"),
    }
    tree = ProcessTree(local.process.pid)
    return PeerServer(name, local.inference, DIALECTS["sagemaker"], ".mar", tree, settings=settings)


@contextmanager
def start_plain(folder: Path, network: torch.nn.Module, count: int) -> Iterator[PeerServer]:
    """ONNX Runtime behind a socket, see `plain_worker`."""
    with serve_plain(folder, network, count) as (url, pids):
        yield _wrap_plain("plain", url, pids, f"onnxruntime {version('onnxruntime')}")


@contextmanager
def start_plain_openvino(
    folder: Path, network: torch.nn.Module, count: int, say: Callable[[str], None]
) -> Iterator[PeerServer]:
    """OpenVINO in the place of ONNX Runtime in the plain peer."""
    python = str(make_environment("openvino", say) / "bin" / "python")
    with serve_plain(folder, network, count, "openvino", python) as (url, pids):
        yield _wrap_plain("plain openvino", url, pids, f"openvino {OPENVINO}")


def _wrap_plain(name: str, url: str, pids: Sequence[int], engine: str) -> PeerServer:
    settings = {
        "front": " ".join(FRONT),
        "worker": f"plain_worker.py: one process, {engine}, one thread, a session a model; no checks",
    }
    return PeerServer(name, url, DIALECTS["sagemaker"], "", ProcessTree(*pids), fixed=True, settings=settings)


PEERS: Mapping[str, Starter] = {
    "torchserve": start_torchserve,
    "mms": start_mms,
    "mlserver": start_mlserver,
    "ray": start_ray,
}
PACKAGE = {"torchserve": "torchserve", "mms": "multi-model-server", "mlserver": "mlserver", "ray": "ray"}


def _low_port() -> int:
    """Return a free port below 2**15, because Multi Model Server reads ports as signed 16-bit numbers."""
    while True:
        port = random.randrange(20_000, 2**15)
        if not is_reachable(port):
            return port


def require_java() -> None:
    """Check that Java is installed. Raises PeerUnavailable that says how to install it."""
    found = shutil.which("java")
    said = subprocess.run([found, "-version"], capture_output=True, text=True, check=False).stderr if found else ""
    major = said.partition('version "')[2].partition(".")[0].partition('"')[0]
    if not major.isdigit() or int(major) < JAVA:
        raise PeerUnavailable(
            f"needs Java {JAVA}, found {major or 'none'}: apt-get install openjdk-{JAVA}-jre-headless"
        )

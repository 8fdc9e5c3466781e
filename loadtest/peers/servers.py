"""Starts every server of the comparison on loopback: Fleetcast, the plain peer, and the others.

Each starter is a context manager that yields a `PeerServer`; it ends all its processes. Settings are what a user would
choose for small models on a small machine: one worker per model and one thread; all else is the default.
"""

import http.client
import json
import os
import random
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, urlencode, urlsplit

import numpy as np
import numpy.typing as npt
import torch

from loadtest.driver.dialects import DIALECTS, ClientDialect
from loadtest.observe.local_server import LocalServer, run_local_server
from loadtest.observe.processes import find_free_port, is_reachable
from loadtest.peers.environments import HERE, PeerUnavailable, make_environment
from loadtest.peers.plain import serve_plain
from loadtest.peers.process_tree import ProcessTree, read_log_end, start_process
from server.contract import JSON

START_S = 120.0
LOAD_S = 120.0
JAVA = 17
UNBOUNDED = 100_000  #: most models of a Ray replica, more than any run has


@dataclass(frozen=True, slots=True)
class PeerServer:
    """A running server. `register` loads a model; if it is None, the first request loads it.

    A `fixed` server has all its models from the start, each with the weights of m0.
    """

    name: str
    url: str
    dialect: ClientDialect
    suffix: str
    tree: ProcessTree
    prepare: Callable[[str], object] = lambda _: None
    register: Callable[[str], None] | None = None
    fixed: bool = False

    def __repr__(self) -> str:
        return f"<PeerServer {self.name} at {self.url}, {self.tree}>"

    def ask(self, model: str, body: bytes) -> npt.NDArray[np.float64]:
        """Request a model and return the numbers of its response, flat.

        Raises RuntimeError for any status but 200, OSError without a response.
        """
        path = self.dialect.path.format(model=quote(model + self.suffix))
        headers = {key: value.format(model=model + self.suffix) for key, value in self.dialect.headers.items()}
        status, data = send_request("POST", self.url + path, body, {"Content-Type": JSON, **headers})
        if status != http.HTTPStatus.OK:
            raise RuntimeError(f"{self.name} answered {status} for {model}: {data[:200].decode(errors='replace')}")
        answer = json.loads(data)
        found = answer["outputs"][0]["data"] if "outputs" in answer else answer["predictions"]
        return np.asarray(found, np.float64).ravel()

    def load(self, model: str, body: bytes) -> float:
        """Measure the seconds from registering a model to its first answer, without packing it."""
        self.prepare(model)
        begin = time.perf_counter()
        if self.register is not None:
            self.register(model)
        self.ask(model, body)
        return time.perf_counter() - begin


Starter = Callable[..., AbstractContextManager[PeerServer]]


def send_request(
    method: str, url: str, body: bytes = b"", headers: Mapping[str, str] | None = None
) -> tuple[int, bytes]:
    """Send one request on a new connection."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.netloc, timeout=LOAD_S)
    try:
        connection.request(method, parts.path + (f"?{parts.query}" if parts.query else ""), body, dict(headers or {}))
        reply = connection.getresponse()
        return reply.status, reply.read()
    finally:
        connection.close()


def post_accepted(name: str, url: str) -> None:
    """POST without a body. Raises RuntimeError with the response if it is refused."""
    status, data = send_request("POST", url)
    if status != http.HTTPStatus.OK:
        raise RuntimeError(
            f"{name} refused a model with {status}: {' '.join(data.decode(errors='replace').split())[:200]}"
        )


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
        with start_process(line, folder, _make_environment(binaries, folder)) as (tree, log):
            _wait_for(name, f"{base}/ping", tree, log)

            def prepare(model: str) -> None:
                _pack_peer_archive(name, binaries, models / model, folder / "archives")

            def register(model: str) -> None:
                query = {"url": f"{model}.mar", "model_name": model, "initial_workers": 1, "synchronous": "true"}
                post_accepted(name, f"{management}/models?{urlencode(query)}")

            yield PeerServer(name, base, DIALECTS[name], "", tree, prepare, register)


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
        with start_process([str(binaries / "mlserver"), "start", "."], folder, _make_environment(binaries, folder)) as (
            tree,
            log,
        ):
            base = f"http://127.0.0.1:{ports['http_port']}"
            _wait_for("mlserver", f"{base}/v2/health/live", tree, log)

            def prepare(model: str) -> None:
                (folder / model).mkdir(exist_ok=True)
                parameters = {"uri": str(models / model)}
                described = {"name": model, "implementation": "handler.MLServerModel", "parameters": parameters}
                (folder / model / "model-settings.json").write_text(json.dumps(described))

            def register(model: str) -> None:
                post_accepted("mlserver", f"{base}/v2/repository/models/{model}/load")

            yield PeerServer("mlserver", base, DIALECTS["v2"], "", tree, prepare, register)


@contextmanager
def start_ray(
    models: Path, say: Callable[[str], None], most: int = UNBOUNDED, environment: Mapping[str, str] | None = None
) -> Iterator[PeerServer]:
    """Ray Serve: proxy, controller and one replica that multiplexes at most so many models.

    `environment`: Ray's own variables, which choose its shape.
    """
    binaries = make_environment("ray", say) / "bin"
    with tempfile.TemporaryDirectory(prefix="peer-") as text:
        folder, port = Path(text), find_free_port()
        for file in ("network.py", "ray/handler.py"):
            shutil.copy(HERE / file, folder)
        line = [str(binaries / "python"), "handler.py", str(models), str(port), str(most), str(folder / "ray")]
        variables = {**_make_environment(binaries, folder), **(environment or {})}
        with start_process(line, folder, variables) as (tree, log):
            _wait_for("ray", f"http://127.0.0.1:{port}/-/routes", tree, log, "ready")
            yield PeerServer("ray", f"http://127.0.0.1:{port}", DIALECTS["ray"], "", tree)


@contextmanager
def start_fleetcast(name: str, store: Path) -> Iterator[PeerServer]:
    """Fleetcast with its defaults."""
    with run_local_server(str(store)) as local:
        yield wrap_server(name, local)


def wrap_server(name: str, local: LocalServer) -> PeerServer:
    """Wrap a running Fleetcast server."""
    return PeerServer(name, local.inference, DIALECTS["sagemaker"], ".mar", ProcessTree(local.process.pid))


@contextmanager
def start_plain(folder: Path, network: torch.nn.Module, count: int) -> Iterator[PeerServer]:
    """ONNX Runtime behind a socket, see `plain_worker`."""
    with serve_plain(folder, network, count) as (url, pids):
        yield PeerServer("plain", url, DIALECTS["sagemaker"], "", ProcessTree(*pids), fixed=True)


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


def _make_environment(binaries: Path, folder: Path) -> dict[str, str]:
    """Make the environment of a peer's processes: its own PATH and temporary folder, one thread, no telemetry."""
    kept = {key: value for key, value in os.environ.items() if key in ("HOME", "LANG", "JAVA_HOME")}
    quiet = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_SERVE_ENABLE_TELEMETRY": "0", "PYTHONUNBUFFERED": "1"}
    paths = {"PATH": f"{binaries}:{os.environ['PATH']}", "TMPDIR": str(folder), "TEMP": str(folder)}
    return {**kept, **quiet, **paths, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def _wait_for(name: str, url: str, tree: ProcessTree, log: Path, word: str = "") -> None:
    """Wait until the URL answers 200 (and the log has the word). Raises PeerUnavailable with the end of its output."""
    begin = time.monotonic()
    while time.monotonic() - begin < START_S and tree.pids():
        try:
            if send_request("GET", url)[0] == http.HTTPStatus.OK and word in log.read_text(errors="replace"):
                return
        except (OSError, http.client.HTTPException):
            pass
        time.sleep(0.1)
    waited = time.monotonic() - begin
    how = f"was not ready within {waited:.0f} s" if tree.pids() else f"ended after {waited:.0f} s before it was ready"
    raise PeerUnavailable(f"{name} {how}: {read_log_end(log)}")

"""Starts Triton 2.51 from the wheel `nvidia-pytriton`, which has the server, its Python backend and their libraries.

pytriton itself is not used: it puts a proxy of its own between the server and the model. Here Triton runs as it does in
its image: a repository of models, each with a process of the Python backend, loaded by the repository's API.
"""

import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from loadtest.driver.dialects import DIALECTS
from loadtest.observe.processes import find_free_port
from loadtest.peers.environments import HERE, PeerUnavailable, make_environment
from loadtest.peers.graphs import export_graph
from loadtest.peers.network import load_network
from loadtest.peers.peer_server import (
    PeerServer,
    describe_settings,
    make_process_environment,
    post_accepted,
    wait_for_server,
)
from loadtest.peers.process_tree import start_process

MOST_ROWS = 32  #: of a batch: as many as connections
HTTP_THREADS = 8  #: Triton's default
ASK_PYTHON = """
import sys, sysconfig
print(sysconfig.get_path("purelib"), sysconfig.get_config_var("LIBDIR"), "%d.%d" % sys.version_info[:2], sep="\\n")
"""


@dataclass(frozen=True, slots=True)
class Wheel:
    """Where the environment of the peer has what the wheel and Python brought."""

    packages: Path
    libraries: Path  #: of Python itself, whose shared library the backend's stub needs
    python: str  #: such as 3.11

    @property
    def home(self) -> Path:
        """The folder of the server in the wheel."""
        return self.packages / "pytriton" / "tritonserver"

    @property
    def stub(self) -> Path:
        """The program in which the Python backend runs a model, built for this Python."""
        return self.home / "python_backend_stubs" / self.python / "triton_python_backend_stub"


def write_model_config(name: str) -> str:
    """Write a model's `config.pbtxt`: one instance, and a batcher that takes what has come and waits for nothing."""
    return f"""name: "{name}"
backend: "python"
max_batch_size: {MOST_ROWS}
input [{{ name: "x" data_type: TYPE_FP32 dims: [ 8, 168 ] }}]
output [{{ name: "predictions" data_type: TYPE_FP32 dims: [ 24, 5 ] }}]
instance_group [{{ count: 1 kind: KIND_CPU }}]
dynamic_batching {{ max_queue_delay_microseconds: 0 }}
"""


def write_command(wheel: Wheel, folder: Path, port: int) -> list[str]:
    """Write the command of the server: only HTTP, on loopback; models come and go by the repository's API."""
    flags = {
        "model-repository": folder / "models",
        "backend-directory": folder / "backends",
        "model-control-mode": "explicit",
        "http-address": "127.0.0.1",
        "http-port": port,
        "http-thread-count": HTTP_THREADS,
        "allow-grpc": "false",
        "allow-metrics": "false",
        "log-info": "false",
    }
    return [str(wheel.home / "bin" / "tritonserver"), *(f"--{flag}={value}" for flag, value in flags.items())]


@contextmanager
def start_triton(models: Path, say: Callable[[str], None]) -> Iterator[PeerServer]:
    """Triton: a C++ front, one process of the Python backend a model with ONNX Runtime on one thread."""
    binaries = make_environment("triton", say) / "bin"
    wheel = find_wheel(binaries)
    with tempfile.TemporaryDirectory(prefix="peer-") as text:
        folder, port = Path(text), find_free_port()
        _lay_backend(wheel, folder / "backends" / "python")
        (folder / "models").mkdir()
        line = write_command(wheel, folder, port)
        environment = make_process_environment(binaries, folder) | {
            "PYTHONPATH": str(wheel.packages),
            "LD_LIBRARY_PATH": f"{wheel.packages / 'nvidia_pytriton.libs'}:{wheel.libraries}",
        }
        base = f"http://127.0.0.1:{port}"
        with start_process(line, folder, environment) as (tree, log):
            wait_for_server("triton", f"{base}/v2/health/live", tree, log)

            def prepare(model: str) -> None:
                _lay_model(models / model, folder / "models" / model)

            def register(model: str) -> None:
                post_accepted("triton", f"{base}/v2/repository/models/{model}/load")

            settings = describe_settings(folder, line, environment, config=write_model_config("NAME"))
            yield PeerServer("triton", base, DIALECTS["v2"], "", tree, prepare, register, settings=settings)


def find_wheel(binaries: Path) -> Wheel:
    """Find the parts of the wheel. Raises PeerUnavailable where it has none for this Python."""
    asked = subprocess.run([str(binaries / "python"), "-c", ASK_PYTHON], capture_output=True, text=True, check=True)
    packages, libraries, python = asked.stdout.split("\n")[:3]
    wheel = Wheel(Path(packages), Path(libraries), python)
    if not wheel.stub.exists():
        raise PeerUnavailable(
            f"triton: the wheel has no Python backend for Python {python}; it has one for 3.9 to 3.12"
        )
    return wheel


def _lay_backend(wheel: Wheel, backend: Path) -> None:
    """Lay the backend's folder as Triton wants it: the library, its utilities, and the stub for this Python."""
    backend.mkdir(parents=True)
    for file in (wheel.home / "backends" / "python").iterdir():
        if file.is_file():
            shutil.copy(file, backend)
    shutil.copy(wheel.stub, backend)
    (backend / wheel.stub.name).chmod(0o755)


def _lay_model(weights: Path, model: Path) -> None:
    """Lay a model of the repository: its configuration, and in version 1 the graph and the code."""
    (model / "1").mkdir(parents=True, exist_ok=True)
    (model / "config.pbtxt").write_text(write_model_config(model.name))
    shutil.copy(HERE / "triton" / "handler.py", model / "1" / "model.py")
    export_graph(load_network(str(weights)), model / "1" / "model.onnx", any_rows=True)

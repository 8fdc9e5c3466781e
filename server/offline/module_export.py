"""Exports a user's nn.Module as a graph in a separate process, where the user's file finds the user's own packages.

Our packages are called `handlers`, `server`, `model_store` and `loadtest`; a user may well have some of these beside
his file. The parent starts `python -P -m server.offline.module_export FOLDER` and leaves the request in FOLDER. The
child imports what it needs of ours first, then forgets our packages' names, so that an `import handlers` in the user's
file finds the user's. The child leaves the graph and its weights in FOLDER, or the reason why there are none.
"""

import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors.torch import load_file
from torch import nn

from handlers.kinds.graph.export import export_graph
from model_store.archives.manifest import GRAPH_FILE
from model_store.archives.packing import WEIGHTS_FILE, save_tensors
from model_store.errors import ArchiveInvalid

OUR_PACKAGES = ("server", "handlers", "model_store", "loadtest")
STDERR = 2  #: the descriptor
REQUEST_FILE, ERROR_FILE = "request.json", "error.txt"


class ExportRequest(msgspec.Struct, frozen=True):
    """What the child is to export: `FILE.py:NAME`, its keyword arguments, its inputs' shapes, its state dict's file."""

    module: str
    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    weights: str | None


def export_module(request: ExportRequest) -> dict[str, bytes]:
    """The graph and weights of the module, as archive members by name. The user's code runs in a child process.

    Raises:
        ArchiveInvalid: the flag, file or operator that is wrong.
        OSError: a file cannot be read, or the process cannot be started.
    """
    with tempfile.TemporaryDirectory(prefix="fleetcast-export-") as name:
        folder = Path(name)
        (folder / REQUEST_FILE).write_bytes(msgspec.json.encode(request))
        command = [sys.executable, "-P", "-m", "server.offline.module_export", str(folder)]
        # What the user's code prints goes to stderr: stdout belongs to the command's own answer.
        done = subprocess.run(command, env=_make_environment(), stdin=subprocess.DEVNULL, stdout=STDERR, check=False)  # noqa: S603
        error = folder / ERROR_FILE
        if error.exists():
            raise ArchiveInvalid(error.read_text())
        if done.returncode:
            raise ArchiveInvalid(f"--module {request.module}: its process ended with code {done.returncode}")
        return {member: (folder / member).read_bytes() for member in (GRAPH_FILE, WEIGHTS_FILE)}


def _make_environment() -> dict[str, str]:
    """The child's environment: our own packages can be imported from wherever this process has them."""
    root = str(Path(__file__).parents[2])
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))}


def _forget_our_packages() -> None:
    """From here on `import server` means the user's, if he has one. Modules that we hold already go on working."""
    for name in list(sys.modules):
        if name.partition(".")[0] in OUR_PACKAGES:
            del sys.modules[name]


def _load_module(module: str, config: dict[str, Any]) -> nn.Module:
    """What `NAME(**config)` of the file returns."""
    path, _, name = module.rpartition(":")
    file = Path(path).expanduser().resolve()
    if not path or not file.is_file():
        raise ArchiveInvalid(f"--module {module}: give FILE.py:NAME, a file and what it calls the module's class")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None:
        raise ArchiveInvalid(f"--module {module}: {file.name} is not a Python file")
    sys.path.insert(0, str(file.parent))  # so that it may import its neighbours
    code = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = code  # dataclasses look themselves up
    try:
        spec.loader.exec_module(code)
        made = getattr(code, name)(**config)
    except Exception as error:  # it is the user's code, and says best what is wrong with it
        raise ArchiveInvalid(f"--module {module}: {type(error).__name__}: {error}") from error
    if not isinstance(made, nn.Module):
        raise ArchiveInvalid(f"--module {module}: it gives {type(made).__name__}, not a torch.nn.Module")
    return made


def _load_state(weights: Path) -> dict[str, torch.Tensor]:
    """A state dict of safetensors, or of a .pt or .pth file that holds tensors alone."""
    if weights.suffix in (".pt", ".pth"):
        found: dict[str, torch.Tensor] = torch.load(weights, map_location="cpu", weights_only=True)
        return found
    return dict(load_file(weights))


def _export_module(request: ExportRequest) -> dict[str, bytes]:
    """Archive members by name. Raises ArchiveInvalid."""
    made = _load_module(request.module, request.config)
    if request.weights is not None:
        try:
            made.load_state_dict(_load_state(Path(request.weights)))
        except Exception as error:  # torch has many names for a file that does not fit
            raise ArchiveInvalid(f"{request.weights}: not the state dict of {request.module}: {error}") from error
    graph, tensors = export_graph(made, request.shapes)
    return {GRAPH_FILE: graph, WEIGHTS_FILE: save_tensors(tensors)}


def main(folder: Path) -> None:
    """What the child process runs."""
    request = msgspec.json.decode((folder / REQUEST_FILE).read_bytes(), type=ExportRequest)
    _forget_our_packages()
    try:
        for member, content in _export_module(request).items():
            (folder / member).write_bytes(content)
    except ArchiveInvalid as error:
        (folder / ERROR_FILE).write_text(str(error))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

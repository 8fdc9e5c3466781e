"""Exports a user's nn.Module as a graph in a separate process, where the user's file finds the user's own packages.

Our packages are called `handlers`, `server`, `model_store` and `loadtest`; a user may have packages of these names
beside the file. The parent starts `python -P -m server.offline.module_export FOLDER` and leaves the request in FOLDER.
The child first imports the modules of ours that it needs, then removes their names, so that an `import handlers` in
the user's file finds the user's package. The child leaves the graph and its weights in FOLDER, or the error.
"""

import importlib.util
import os
import subprocess
import sys
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
from server.temporary_folders import temporary_folder

OUR_PACKAGES = ("server", "handlers", "model_store", "loadtest")
STDERR = 2  #: the descriptor
REQUEST_FILE, ERROR_FILE = "request.json", "error.txt"


class ExportRequest(msgspec.Struct, frozen=True):
    """The module to export: `FILE.py:NAME`, its keyword arguments, its inputs' shapes, its state dict's file."""

    module: str
    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    weights: str | None


def export_module(request: ExportRequest) -> dict[str, bytes]:
    """Export the module as archive members by name: graph and weights. The user's code runs in a child process.

    Raises:
        ArchiveInvalid: the flag, file or operator that is wrong.
        OSError: a file cannot be read, or the process cannot be started.
    """
    with temporary_folder("fleetcast-export-") as folder:
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
    """Make the environment of the child, in which our packages are imported from the same place as here."""
    root = str(Path(__file__).parents[2])
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))}


def _forget_our_packages() -> None:
    """Make `import server` find a package of the user from now on. Modules that are imported already keep working."""
    for name in list(sys.modules):
        if name.partition(".")[0] in OUR_PACKAGES:
            del sys.modules[name]


def _load_module(module: str, config: dict[str, Any]) -> nn.Module:
    """Load the file and return `NAME(**config)`."""
    path, _, name = module.rpartition(":")
    file = Path(path).expanduser().resolve()
    if not path or not file.is_file():
        raise ArchiveInvalid(f"--module {module}: give FILE.py:NAME, a file and what it calls the module's class")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None:
        raise ArchiveInvalid(f"--module {module}: {file.name} is not a Python file")
    sys.path.insert(0, str(file.parent))  # so that the file can import its neighbours
    code = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = code  # dataclasses look up their own module
    try:
        spec.loader.exec_module(code)
        made = getattr(code, name)(**config)
    except Exception as error:  # the user's code has the best message
        raise ArchiveInvalid(f"--module {module}: {type(error).__name__}: {error}") from error
    if not isinstance(made, nn.Module):
        raise ArchiveInvalid(f"--module {module}: it gives {type(made).__name__}, not a torch.nn.Module")
    return made


def _load_state(weights: Path) -> dict[str, torch.Tensor]:
    """Load a state dict from safetensors, or from a .pt or .pth file that contains only tensors."""
    if weights.suffix in (".pt", ".pth"):
        found: dict[str, torch.Tensor] = torch.load(weights, map_location="cpu", weights_only=True)
        return found
    return dict(load_file(weights))


def _export_module(request: ExportRequest) -> dict[str, bytes]:
    """Export the module as archive members by name. Raises ArchiveInvalid."""
    made = _load_module(request.module, request.config)
    if request.weights is not None:
        try:
            made.load_state_dict(_load_state(Path(request.weights)))
        except Exception as error:  # torch raises many classes for a wrong file
            raise ArchiveInvalid(f"{request.weights}: not the state dict of {request.module}: {error}") from error
    graph, tensors = export_graph(made, request.shapes)
    return {GRAPH_FILE: graph, WEIGHTS_FILE: save_tensors(tensors)}


def main(folder: Path) -> None:
    """Run the child process."""
    request = msgspec.json.decode((folder / REQUEST_FILE).read_bytes(), type=ExportRequest)
    _forget_our_packages()
    try:
        for member, content in _export_module(request).items():
            (folder / member).write_bytes(content)
    except ArchiveInvalid as error:
        (folder / ERROR_FILE).write_text(str(error))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

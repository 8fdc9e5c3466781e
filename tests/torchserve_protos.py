"""The messages of TorchServe's gRPC services, made from the .proto files in its own wheel: what its clients speak."""

import subprocess
import sys
import zipfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pb2
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass

FILES = ("proto/inference.proto", "proto/management.proto")


def compile_protos(folder: Path, files: Sequence[str], into: Path) -> dict[str, Any]:
    """The files' descriptors by name, as protoc makes them, those that they import before them."""
    command = [
        sys.executable,
        "-m",
        "grpc_tools.protoc",
        "-I",
        ".",
        "--include_imports",
        f"--descriptor_set_out={into}",
    ]
    subprocess.run([*command, *files], cwd=folder, check=True, timeout=120)
    return {file.name: file for file in descriptor_pb2.FileDescriptorSet.FromString(into.read_bytes()).file}


def read_wheel(folder: Path) -> dict[str, Any]:
    """The descriptors of the wheel's files by name. `folder` gets the files."""
    found = find_spec("ts")
    assert found is not None
    assert found.origin is not None
    with zipfile.ZipFile(Path(found.origin).parent / "frontend" / "model-server.jar") as jar:
        jar.extractall(folder, [name for name in jar.namelist() if name.endswith(".proto") and "/" in name])
    return compile_protos(folder, FILES, folder / "made")


class TorchServeMessages:
    """The wheel's message classes, by their full names after `org.pytorch.serve.grpc.`."""

    def __init__(self, folder: Path) -> None:
        self._pool = DescriptorPool()
        for file in read_wheel(folder).values():
            self._pool.Add(file)

    def __repr__(self) -> str:
        return "<TorchServeMessages>"

    def get(self, name: str) -> Any:
        """A class, for example of `inference.PredictionsRequest`."""
        known: Any = GetMessageClass(self._pool.FindMessageTypeByName(f"org.pytorch.serve.grpc.{name}"))
        return known

"""The registry of archive kinds. The server, the tools and the load tester build and describe archives through it.

A kind is a file with an `ArchiveKind`, and its line in `_ENTRIES`. `model_store.archives.archive` recognises an
archive's kind.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from handlers.base import Shape
from handlers.kinds.correlation import CorrelationKind
from handlers.kinds.forecaster import ForecasterKind
from handlers.kinds.graph.archive_kind import GraphKind
from handlers.kinds.models import ArchiveKind, BuiltModel, RowModel, RunRow, SingleModel, Target, run_row_on_cpu
from handlers.kinds.onnx import OnnxKind
from model_store.archives.archive import Archive, require_supported
from model_store.archives.manifest import Kind
from model_store.errors import LoadError

__all__ = [
    "KINDS",
    "ArchiveKind",
    "BuiltModel",
    "RowModel",
    "RunRow",
    "SingleModel",
    "Target",
    "build_model",
    "describe_kind",
    "prove_model",
    "run_row_on_cpu",
    "tensor_inputs",
]

_ENTRIES: tuple[ArchiveKind, ...] = (
    CorrelationKind(),
    ForecasterKind(),
    GraphKind(),
    OnnxKind(),
)

CPU = Target()  #: one thread of this process

KINDS: Mapping[Kind, ArchiveKind] = MappingProxyType({entry.kind: entry for entry in _ENTRIES})


def build_model(archive: Archive, target: Target = CPU) -> BuiltModel:
    """The archive's model, everything checked but its golden sample. Every error names the archive.

    Raises:
        UnsupportedKind: the archive's kind is not run by this version, or what it needs is not installed.
        ArchiveInvalid: a record, a tensor or the network does not fit.
    """
    require_supported(archive)
    try:
        return KINDS[archive.kind].build(archive, target)
    except LoadError as error:
        if str(error).startswith(archive.name):
            raise
        raise type(error)(f"{archive.name}: {error}") from error  # networks and codecs do not know the archive


def prove_model(archive: Archive, built: BuiltModel, run_row: RunRow = run_row_on_cpu) -> bool:
    """Run the archive's golden sample on its model; False where it has none. Raises GoldenMismatch."""
    golden = archive.golden()
    if golden is not None:
        built.body.prove(archive.name, golden, built.row, run_row)
    return golden is not None


def describe_kind(archive: Archive) -> dict[str, Any]:
    """What a kind says of an archive beyond its records; empty for a kind that does not run. Raises LoadError."""
    entry = KINDS.get(archive.kind)
    return {} if entry is None else entry.describe(archive)


def tensor_inputs(archive: Archive) -> Mapping[str, Shape]:
    """The inputs of a tensor request by name, without batch axis, -1 where open. Raises LoadError."""
    require_supported(archive)
    return KINDS[archive.kind].tensor_inputs(archive)

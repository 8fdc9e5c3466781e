"""The registry of archive kinds. The server, the tools and the load tester build and describe archives through it.

A kind is a file with an `ArchiveKind`, and its line in `_ENTRIES`.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from handlers.kinds.code.archive_kind import CodeKind
from handlers.kinds.correlation import CorrelationKind
from handlers.kinds.forecaster import ForecasterKind
from handlers.kinds.graph.archive_kind import GraphKind
from handlers.kinds.models import (
    ArchiveKind,
    BuiltModel,
    RowModel,
    RunRow,
    SingleModel,
    Target,
    TensorInput,
    run_row_on_cpu,
)
from handlers.kinds.onnx import OnnxKind
from handlers.kinds.packing import ArchiveParts
from model_store.archives.archive import Archive, list_names
from model_store.archives.container import quote_name
from model_store.archives.manifest import FLEETCAST_JSON, MAR_MANIFEST, GoldenSample, Kind
from model_store.archives.packing import pack_archive
from model_store.errors import ArchiveInvalid, LoadError

__all__ = [
    "KINDS",
    "ArchiveKind",
    "ArchiveParts",
    "BuiltModel",
    "RowModel",
    "RunRow",
    "SingleModel",
    "Target",
    "build_model",
    "describe_kind",
    "find_kind",
    "pack_model",
    "prove_model",
    "run_row_on_cpu",
    "tensor_inputs",
]

#: Archives without `fleetcast.json` are of the first kind that recognises them.
_ENTRIES: tuple[ArchiveKind, ...] = (
    CodeKind(),
    CorrelationKind(),
    ForecasterKind(),
    GraphKind(),
    OnnxKind(),
)

CPU = Target()  #: one thread of this process

KINDS: Mapping[Kind, ArchiveKind] = MappingProxyType({entry.kind: entry for entry in _ENTRIES})


def find_kind(archive: Archive) -> ArchiveKind:
    """The archive's kind. Raises ArchiveInvalid that says what the archive would have to hold."""
    if archive.spec is not None:
        return KINDS[archive.spec.kind]
    for entry in _ENTRIES:
        if entry.recognises(archive):
            return entry
    model = archive.mar.model if archive.mar else None
    said = (
        f"; {MAR_MANIFEST} names handler {quote_name(model.handler)} and file {quote_name(model.serialized_file)}"
        if model
        else ""
    )
    raise ArchiveInvalid(
        f"{archive.name}: it has neither {FLEETCAST_JSON}, nor a Python handler ({MAR_MANIFEST}, code/*.py, "
        f"inference.py), nor model.onnx{said}; its members: {list_names(map(quote_name, archive.members))}"
    )


def pack_model(
    kind: Kind,
    parts: ArchiveParts,
    *,
    model_name: str,
    model_version: str = "1.0",
    golden: GoldenSample | None = None,
    description: str = "",
) -> bytes:
    """Pack an archive of the kind; equal input gives equal bytes. Names are for the manifest, see `pack_archive`.

    Raises:
        ArchiveInvalid: a tensor has another dtype or a value that is not finite, or a record breaks a rule.
        UnsupportedKind: this version packs no archives of the kind.
    """
    spec, members = KINDS[kind].pack(parts)
    return pack_archive(
        spec, members, model_name=model_name, model_version=model_version, golden=golden, description=description
    )


def build_model(archive: Archive, target: Target = CPU) -> BuiltModel:
    """The archive's model, everything checked but its golden sample. Every error names the archive.

    Raises:
        UnsupportedKind: the archive's kind is not run by this version, or what it needs is not installed.
        ArchiveInvalid: a record, a tensor or the network does not fit.
    """
    entry = find_kind(archive)
    try:
        return entry.build(archive, target)
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
    """What a kind says of an archive beyond its records. Raises LoadError."""
    return find_kind(archive).describe(archive)


def tensor_inputs(archive: Archive) -> Mapping[str, TensorInput]:
    """The inputs of a tensor request by name. Raises LoadError."""
    return find_kind(archive).tensor_inputs(archive)

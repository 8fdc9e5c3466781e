"""What an archive's model needs beside its row to run again: to be kept, and to become a model without the archive.

That is some kilobytes: the records of the archive and its calibration. What all rows of a family need alike, such as
the operators of a graph, is kept once.
"""

from collections.abc import Mapping
from typing import Any, Final, Protocol, TypeGuard, runtime_checkable

import msgspec

from handlers.base import Family, Float32
from handlers.forecasters.mixture import describe_mixture
from handlers.kinds import KINDS, ArchiveKind, find_kind
from handlers.kinds.models import RowModel, Target
from model_store.archives.archive import Archive, read_tensors
from model_store.archives.container import ArchiveMember, Container
from model_store.archives.manifest import FLEETCAST_JSON, GRAPH_FILE, parse_spec
from model_store.errors import ArchiveInvalid

SHARED_FILES: Final = frozenset({GRAPH_FILE})  #: members that archives of one family have in common: they make its key


class KeptArchive(msgspec.Struct, frozen=True):
    """Members by name: the archive's own, and those that its family shares. `facts`: of a whole description."""

    own: dict[str, bytes]
    shared: dict[str, bytes]
    facts: dict[str, Any]


@runtime_checkable
class RowKind(Protocol):
    """A kind whose models are rows that can be kept."""

    def restore(self, archive: Archive, row: Float32, facts: Mapping[str, Any], target: Target) -> RowModel:
        """The model of a row that `build` has made, by an archive without its weights. Raises LoadError."""


def makes_rows(kind: ArchiveKind) -> TypeGuard[RowKind]:
    """Whether models of the kind are rows that can be kept. To ask the protocol itself costs each load more."""
    return kind.kind in _ROW_KINDS


_ROW_KINDS: Final = frozenset(name for name, kind in KINDS.items() if isinstance(kind, RowKind))


def keep_archive(archive: Archive, family: Family) -> KeptArchive | None:
    """What a row of this archive needs to run again; None where its kind says nothing of that. Raises LoadError."""
    if archive.spec is None or not makes_rows(find_kind(archive)):
        return None
    calibration = archive.spec.calibration
    names = {FLEETCAST_JSON, *SHARED_FILES, *((calibration.file,) if calibration else ())}
    found = {name: bytes(archive.read(name)) for name in sorted(names) if name in archive.container.members}
    facts = describe_mixture(family, read_tensors(archive)) if archive.spec.architecture == "mixture" else {}
    return KeptArchive(
        {name: raw for name, raw in found.items() if name not in SHARED_FILES},
        {name: raw for name, raw in found.items() if name in SHARED_FILES},
        facts,
    )


def restore_model(name: str, kept: KeptArchive, row: Float32, target: Target) -> RowModel:
    """The model of a row, by what `keep_archive` has kept. Raises LoadError."""
    raw = kept.own.get(FLEETCAST_JSON)
    if raw is None:
        raise ArchiveInvalid(f"{name}: {FLEETCAST_JSON} was not kept with its row")
    spec = parse_spec(raw)
    kind = KINDS[spec.kind]
    if not makes_rows(kind):
        raise ArchiveInvalid(f"{name}: archives of kind {spec.kind} have no rows")
    archive = Archive(name, spec, None, _make_container({**kept.own, **kept.shared}))
    model = kind.restore(archive, row, kept.facts, target)
    if row.size != model.family.row_floats:
        raise ArchiveInvalid(f"{name}: its row has {row.size} numbers, and its family {model.family.row_floats}")
    return model


def _make_container(members: Mapping[str, bytes]) -> Container:
    """A container that holds these members as they are."""
    data, places = bytearray(), dict[str, ArchiveMember]()
    for name, raw in members.items():
        places[name] = ArchiveMember(len(data), len(raw), len(raw))
        data += raw
    return Container(bytes(data), places)

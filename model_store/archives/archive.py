"""Reads one archive from its bytes: its records and its weights. Pure; runs in loader threads.

Which kind of archive it is, and so how it runs, is for `handlers.kinds` to say.

INVARIANT: nothing of an archive is unpickled, imported or written to disk here. Every error names the archive.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod

import numpy as np
import numpy.typing as npt

from model_store.archives.container import Container, Limits, quote_name
from model_store.archives.manifest import (
    FLEETCAST_JSON,
    MAR_MANIFEST,
    GoldenSample,
    MarManifest,
    Spec,
    parse_golden,
    parse_mar_manifest,
    parse_spec,
)
from model_store.archives.safetensors_reader import TensorRecord, split_safetensors
from model_store.archives.tar_reader import read_tar_gz
from model_store.archives.zip_reader import read_zip
from model_store.errors import ArchiveInvalid, LoadError

__all__ = [
    "DEFAULT_LIMITS",
    "Archive",
    "Limits",
    "check_tensors",
    "list_names",
    "open_archive",
    "read_offsets",
    "read_tensors",
    "view_tensors",
]

Float32 = npt.NDArray[np.float32]
DEFAULT_LIMITS = Limits()

_MAX_RECORD_BYTES = 2 << 20  # of a JSON record
_FLOAT_BYTES = 4
_CHECKED_AT_ONCE = 1 << 20  # numbers, of which the check makes as many bytes
_OFFSETS = "offsets"  # the tensor of a calibration
_OFFSET_ROWS = (1, 24)  # one for all steps, or one for each hour of the day
_MAX_LISTED = 5  # names in one message


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class Archive:
    """An opened archive. Immutable. It keeps the archive's bytes and unpacks a member each time it is read."""

    name: str
    spec: Spec | None  #: `fleetcast.json`
    mar: MarManifest | None
    container: Container

    @property
    def members(self) -> tuple[str, ...]:
        """The files' paths, sorted, relative to the single top folder where there is one."""
        return tuple(sorted(self.container.members))

    def read(self, member: str) -> bytes:
        """The bytes of one member. Raises ArchiveInvalid if it is missing, damaged, or larger than declared."""
        with _name_archive(self.name):
            return self.container.read(member)

    def weights(self) -> bytes:
        """The bytes of the member that `fleetcast.json` says holds the numbers. Checks their sha256 if it gives one.

        Raises:
            ArchiveInvalid: there is no `fleetcast.json`, or the member is damaged or not the one that was packed.
        """
        if self.spec is None:
            raise ArchiveInvalid(f"{self.name}: it has no {FLEETCAST_JSON}, which would name the file of its numbers")
        weights = self.spec.weights
        raw, expected = self.read(weights.file), weights.sha256
        if expected is not None and (found := hashlib.sha256(raw).hexdigest()) != expected:
            where = f"{self.name}: {quote_name(weights.file)}"
            raise ArchiveInvalid(f"{where} has sha256 {found}, but {FLEETCAST_JSON} says {expected}; pack it again")
        return raw

    def read_record(self, member: str) -> bytes:
        """The bytes of a JSON record. Raises ArchiveInvalid if the member is damaged or larger than a record may be."""
        with _name_archive(self.name):
            return _read_record(self.container, member)

    def golden(self) -> GoldenSample | None:
        """The golden sample; None if the archive has none. Raises ArchiveInvalid, which names the field."""
        if self.spec is None or self.spec.golden is None:
            return None
        with _name_archive(self.name):
            return parse_golden(_read_record(self.container, self.spec.golden), self.spec.golden)

    def __repr__(self) -> str:
        what = f"{self.spec.kind} {self.spec.architecture}".rstrip() if self.spec else f"no {FLEETCAST_JSON}"
        return f"<Archive {self.name}: {what}, {len(self.container.members)} members>"


def open_archive(data: bytes, name: str, limits: Limits = DEFAULT_LIMITS) -> Archive:
    """Open the archive in `data`: a zip or a gzipped tar, as its first bytes say. `name` is for messages.

    Raises:
        ArchiveTooLarge: a limit of `limits` is exceeded.
        ArchiveInvalid: not an archive, damaged, hostile, or a record breaks a rule.
    """
    with _name_archive(name):
        container = _read_container(data, limits)
        files = container.members
        spec = parse_spec(_read_record(container, FLEETCAST_JSON)) if FLEETCAST_JSON in files else None
        mar = parse_mar_manifest(_read_record(container, MAR_MANIFEST)) if MAR_MANIFEST in files else None
        if spec is not None:
            offsets = spec.calibration.file if spec.calibration else None
            named = (("weights.file", spec.weights.file), ("golden", spec.golden), ("calibration.file", offsets))
            for field, member in named:
                if member is not None and member not in files:
                    raise ArchiveInvalid(f"{FLEETCAST_JSON}: `{field}` names {quote_name(member)}, which is not there")
        return Archive(name, spec, mar, container)


def read_tensors(archive: Archive) -> dict[str, Float32]:
    """The tensors of a safetensors archive by name: float32 with finite values, in memory of their own.

    Raises:
        ArchiveInvalid: damaged, not safetensors, another dtype, or a value that is not finite; names the tensor.
    """
    # numpy copies without the interpreter's lock.
    return {name: np.array(tensor) for name, tensor in view_tensors(archive).items()}


def view_tensors(archive: Archive) -> dict[str, Float32]:
    """As `read_tensors`, but they cannot be written, and hold the bytes that they were read from in memory."""
    raw = archive.weights()
    where = archive.spec.weights.file if archive.spec else ""
    with _name_archive(f"{archive.name}: {where}"):
        return _decode_tensors(raw)


def read_offsets(archive: Archive) -> Float32 | None:
    """The offsets of the archive's calibration, [rows, levels] or [products, rows, levels]; None if it has none.

    Raises:
        ArchiveInvalid: the member is not the one that was packed, or not offsets for the forecast's levels.
    """
    spec = archive.spec
    if spec is None or not spec.calibration or spec.forecast is None:
        return None
    file = spec.calibration.file
    with _name_archive(f"{archive.name}: {quote_name(file)}"):
        raw = _read_record(archive.container, file)
        if (found := hashlib.sha256(raw).hexdigest()) != spec.calibration.sha256:
            expected = spec.calibration.sha256
            raise ArchiveInvalid(f"it has sha256 {found}, but {FLEETCAST_JSON} says {expected}; calibrate it again")
        tensors = _decode_tensors(raw)
        products = len(spec.forecast.products)
        several = (products,) if products > 1 else ()
        shapes = [(*several, rows, len(spec.forecast.quantile_levels)) for rows in _OFFSET_ROWS]
        if list(tensors) != [_OFFSETS] or tensors[_OFFSETS].shape not in shapes:
            there = ", ".join(f"{quote_name(name)} {list(each.shape)}" for name, each in list(tensors.items())[:5])
            wanted = " or ".join(str(list(shape)) for shape in shapes)
            raise ArchiveInvalid(f"it has the tensors {there}, but should have `{_OFFSETS}` {wanted}")
        return np.array(tensors[_OFFSETS])  # the model keeps it, and none of the bytes that it was read from


def list_tensor_shapes(archive: Archive) -> dict[str, list[int]]:
    """The shapes of an archive's tensors by name, sorted. Raises ArchiveInvalid for tensors that cannot be read."""
    return {name: list(tensor.shape) for name, tensor in sorted(read_tensors(archive).items())}


def check_tensors(
    tensors: Mapping[str, npt.NDArray[np.generic]], parameters: Mapping[str, tuple[int, ...]], name: str
) -> None:
    """Check that `tensors` have exactly the names and shapes of `parameters`; `name` is the archive's.

    Raises:
        ArchiveInvalid: lists missing and unexpected tensors, and those of a wrong shape.
    """
    missing = [quote_name(key) for key in parameters if key not in tensors]
    unexpected = [quote_name(key) for key in tensors if key not in parameters]
    reshaped = [
        f"{quote_name(key)} is {list(tensors[key].shape)} instead of {list(shape)}"
        for key, shape in parameters.items()
        if key in tensors and tensors[key].shape != tuple(shape)
    ]
    found = {"missing": missing, "unexpected": unexpected, "wrong shape": reshaped}
    problems = [f"{what}: {list_names(which)}" for what, which in found.items() if which]
    if problems:
        raise ArchiveInvalid(f"{name}: its tensors are not those of its architecture; {'; '.join(problems)}")


def _read_container(data: bytes, limits: Limits) -> Container:
    limits.check_packed(len(data))
    if data.startswith(b"PK"):
        return read_zip(data, limits)
    if data.startswith(b"\x1f\x8b"):
        return read_tar_gz(data, limits)
    raise ArchiveInvalid("it is neither a zip (.mar) nor a gzip (.tar.gz)")


def _read_record(container: Container, member: str) -> bytes:
    if (size := container.members[member].size) > _MAX_RECORD_BYTES:
        raise ArchiveInvalid(f"{member} has {size} bytes, more than the {_MAX_RECORD_BYTES} a record may have")
    return container.read(member)


def _decode_tensors(raw: bytes) -> dict[str, Float32]:
    """The tensors of a safetensors file, as views of its bytes."""
    tensors = {name: _decode_tensor(name, record, data) for name, record, data in split_safetensors(raw)}
    size = sum(tensor.nbytes for tensor in tensors.values())  # without gaps, at the end of the file
    numbers = np.frombuffer(memoryview(raw)[len(raw) - size :], dtype="<f4")
    pieces = (numbers[at : at + _CHECKED_AT_ONCE] for at in range(0, numbers.size, _CHECKED_AT_ONCE))
    if not all(np.isfinite(piece).all() for piece in pieces):
        name = next(name for name, tensor in tensors.items() if not np.isfinite(tensor).all())
        bad = int(tensors[name].size - np.isfinite(tensors[name]).sum())
        raise ArchiveInvalid(f"the tensor {quote_name(name)} has {bad} values that are NaN or infinite")
    return tensors


def _decode_tensor(name: str, record: TensorRecord, data: memoryview) -> Float32:
    """A view of a tensor's bytes; its values have not been looked at."""
    if record.dtype != "F32":
        what = f"the tensor {quote_name(name)} is {record.dtype}"
        raise ArchiveInvalid(f"{what}; convert it to float32 (F32) before packing")
    if len(data) != prod(record.shape) * _FLOAT_BYTES:
        what = f"{quote_name(name)} has the shape {record.shape[:_MAX_LISTED]} and {len(data)} bytes"
        raise ArchiveInvalid(f"it is not sound safetensors: {what}")
    try:
        return np.frombuffer(data, dtype="<f4").reshape(record.shape)
    except ValueError as error:  # safetensors allows shapes that arrays cannot have: 100 axes, [0, 2**62]
        raise ArchiveInvalid(f"the tensor {quote_name(name)} has an impossible shape: {error}") from error


def list_names(names: Iterable[str]) -> str:
    """The names for a message: the first few, and how many more there are."""
    every = list(names)
    rest = len(every) - _MAX_LISTED
    return ", ".join(every[:_MAX_LISTED]) + (f" and {rest} more" if rest > 0 else "")


@contextmanager
def _name_archive(name: str) -> Iterator[None]:
    """Put the archive's name before the message of an error that is raised inside."""
    try:
        yield
    except LoadError as error:
        raise type(error)(f"{name}: {error}") from error

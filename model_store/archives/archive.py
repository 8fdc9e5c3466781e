"""Reads one archive from its bytes: its kind, its records and its weights. Pure; runs in loader threads.

INVARIANT: nothing of an archive is unpickled, imported or written to disk here. Every error names the archive.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import PurePosixPath

import numpy as np
import numpy.typing as npt

from model_store.archives.container import Container, Limits, quote_name
from model_store.archives.manifest import (
    FLEETCAST_JSON,
    GRAPH_FILE,
    MAR_MANIFEST,
    GoldenSample,
    Kind,
    MarManifest,
    Spec,
    parse_golden,
    parse_mar_manifest,
    parse_spec,
)
from model_store.archives.safetensors_reader import TensorRecord, split_safetensors
from model_store.archives.tar_reader import read_tar_gz
from model_store.archives.zip_reader import read_zip
from model_store.errors import ArchiveInvalid, LoadError, UnsupportedKind

__all__ = ["DEFAULT_LIMITS", "Archive", "Limits", "check_tensors", "open_archive", "read_tensors", "require_supported"]

Float32 = npt.NDArray[np.float32]
DEFAULT_LIMITS = Limits()

_MODEL_ONNX = "model.onnx"
_MAX_RECORD_BYTES = 2 << 20  # of a JSON record
_FLOAT_BYTES = 4
_MAX_LISTED = 5  # names in one message
_TORCHSERVE_HANDLERS = ("image_classifier", "image_segmenter", "object_detector", "text_classifier")
_TORCH_FILES = (".pt", ".pth")
_RUNS_LATER = {
    Kind.CODE: "a later version of Fleetcast runs code in forked child processes where the operator allows it",
}


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class Archive:
    """An opened archive. Immutable. It keeps the archive's bytes and unpacks a member each time it is read."""

    name: str
    kind: Kind
    spec: Spec | None
    mar: MarManifest | None
    weights_file: str | None  #: the member that holds the numbers; None for code, where only the handler knows it
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
        """The bytes of the member that holds the numbers. Checks their sha256 if `fleetcast.json` has one.

        Raises:
            ArchiveInvalid: the member is damaged or not the one that was packed.
            UnsupportedKind: a code archive, whose numbers only its handler can find.
        """
        if self.weights_file is None:
            raise _make_unsupported(self)
        raw = self.read(self.weights_file)
        expected = self.spec.weights.sha256 if self.spec else None
        if expected is not None and (found := hashlib.sha256(raw).hexdigest()) != expected:
            where = f"{self.name}: {quote_name(self.weights_file)}"
            raise ArchiveInvalid(f"{where} has sha256 {found}, but {FLEETCAST_JSON} says {expected}; pack it again")
        return raw

    def graph(self) -> bytes:
        """The bytes of a graph archive's operators. Raises ArchiveInvalid if the member is damaged or too large."""
        with _name_archive(self.name):
            return _read_record(self.container, GRAPH_FILE)

    def golden(self) -> GoldenSample | None:
        """The golden sample; None if the archive has none. Raises ArchiveInvalid, which names the field."""
        if self.spec is None or self.spec.golden is None:
            return None
        with _name_archive(self.name):
            return parse_golden(_read_record(self.container, self.spec.golden), self.spec.golden)

    def __repr__(self) -> str:
        what = f"{self.kind} {self.spec.architecture}" if self.spec and self.spec.architecture else str(self.kind)
        return f"<Archive {self.name}: {what}, {len(self.container.members)} members>"


def open_archive(data: bytes, name: str, limits: Limits = DEFAULT_LIMITS) -> Archive:
    """Open the archive in `data`: a zip or a gzipped tar, as its first bytes say. `name` is for messages.

    Raises:
        ArchiveTooLarge: a limit of `limits` is exceeded.
        ArchiveInvalid: not an archive, damaged, hostile, of no known kind, or a record breaks a rule.
    """
    with _name_archive(name):
        container = _read_container(data, limits)
        files = container.members
        spec = parse_spec(_read_record(container, FLEETCAST_JSON)) if FLEETCAST_JSON in files else None
        mar = parse_mar_manifest(_read_record(container, MAR_MANIFEST)) if MAR_MANIFEST in files else None
        if spec is not None:
            for field, member in (("weights.file", spec.weights.file), ("golden", spec.golden)):
                if member is not None and member not in files:
                    raise ArchiveInvalid(f"{FLEETCAST_JSON}: `{field}` names {quote_name(member)}, which is not there")
            if spec.kind is Kind.GRAPH and GRAPH_FILE not in files:
                raise ArchiveInvalid(
                    f"{FLEETCAST_JSON} says graph, but {GRAPH_FILE}, which holds the operators, is missing"
                )
            return Archive(name, spec.kind, spec, mar, spec.weights.file, container)
        kind, weights_file = _kind_without_spec(files, mar)
        return Archive(name, kind, None, mar, weights_file, container)


def require_supported(archive: Archive) -> None:
    """Raises UnsupportedKind for a kind that this server does not run; the message says what does."""
    if archive.kind in _RUNS_LATER:
        raise _make_unsupported(archive)


def read_tensors(archive: Archive) -> dict[str, Float32]:
    """The tensors of a safetensors archive by name: float32 with finite values, in memory of their own.

    Raises:
        ArchiveInvalid: damaged, not safetensors, another dtype, or a value that is not finite; names the tensor.
    """
    raw = archive.weights()
    with _name_archive(f"{archive.name}: {archive.weights_file}"):
        return {name: _decode_tensor(name, record, data) for name, record, data in split_safetensors(raw)}


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
    problems = [f"{what}: {_list_names(which)}" for what, which in found.items() if which]
    if problems:
        raise ArchiveInvalid(f"{name}: its tensors are not those of its architecture; {'; '.join(problems)}")


def _read_container(data: bytes, limits: Limits) -> Container:
    limits.check_packed(len(data))
    if data.startswith(b"PK"):
        return read_zip(data, limits)
    if data.startswith(b"\x1f\x8b"):
        return read_tar_gz(data, limits)
    raise ArchiveInvalid("it is neither a zip (.mar) nor a gzip (.tar.gz)")


def _kind_without_spec(files: Iterable[str], mar: MarManifest | None) -> tuple[Kind, str | None]:
    """The kind of an archive without `fleetcast.json`, and its weights file if that is known."""
    names = set(files)
    handler = mar.model.handler if mar else ""
    serialized = mar.model.serialized_file if mar else ""
    module = handler.partition(":")[0].removesuffix(".py") + ".py"  # `service.py:handle`, `service:handle`, `service`
    if module in names or any(_is_sagemaker_code(name) for name in names):
        return Kind.CODE, None
    onnx = serialized if serialized.endswith(".onnx") else _MODEL_ONNX
    if onnx in names:
        return Kind.ONNX, onnx
    if handler in _TORCHSERVE_HANDLERS or serialized.endswith(_TORCH_FILES):
        return Kind.CODE, None
    said = f"; {MAR_MANIFEST} names handler {quote_name(handler)} and file {quote_name(serialized)}" if mar else ""
    raise ArchiveInvalid(
        f"it has neither {FLEETCAST_JSON}, nor a Python handler ({MAR_MANIFEST}, code/*.py, inference.py), "
        f"nor {_MODEL_ONNX}{said}; its members: {_list_names(map(quote_name, sorted(names)))}"
    )


def _is_sagemaker_code(name: str) -> bool:
    path = PurePosixPath(name)
    return name == "inference.py" or (path.suffix == ".py" and path.parts[0] == "code")


def _read_record(container: Container, member: str) -> bytes:
    if (size := container.members[member].size) > _MAX_RECORD_BYTES:
        raise ArchiveInvalid(f"{member} has {size} bytes, more than the {_MAX_RECORD_BYTES} a record may have")
    return container.read(member)


def _decode_tensor(name: str, record: TensorRecord, data: memoryview) -> Float32:
    if record.dtype != "F32":
        what = f"the tensor {quote_name(name)} is {record.dtype}"
        raise ArchiveInvalid(f"{what}; convert it to float32 (F32) before packing")
    if len(data) != prod(record.shape) * _FLOAT_BYTES:
        what = f"{quote_name(name)} has the shape {record.shape[:_MAX_LISTED]} and {len(data)} bytes"
        raise ArchiveInvalid(f"it is not sound safetensors: {what}")
    try:
        # The copy has memory of its own, and numpy makes it without the interpreter's lock.
        tensor = np.array(np.frombuffer(data, dtype="<f4").reshape(record.shape))
    except ValueError as error:  # safetensors allows shapes that arrays cannot have: 100 axes, [0, 2**62]
        raise ArchiveInvalid(f"the tensor {quote_name(name)} has an impossible shape: {error}") from error
    if not np.isfinite(tensor).all():
        bad = int(tensor.size - np.isfinite(tensor).sum())
        raise ArchiveInvalid(f"the tensor {quote_name(name)} has {bad} values that are NaN or infinite")
    return tensor


def _make_unsupported(archive: Archive) -> UnsupportedKind:
    handler = f" (handler {quote_name(archive.mar.model.handler)})" if archive.mar and archive.mar.model.handler else ""
    return UnsupportedKind(
        f"{archive.name} is a {archive.kind} archive{handler}; this version runs forecaster, graph and onnx archives, "
        f"and {_RUNS_LATER[archive.kind]}"
    )


def _list_names(names: Iterable[str]) -> str:
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

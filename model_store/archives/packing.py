"""Writes archives: valid MAR files whose bytes depend only on their content. Pure; for tools and tests, not servers.

Members are stored, not deflated: weights hardly compress, and a stored member is read by a plain copy.
"""

import hashlib
import io
import zipfile
from collections.abc import Mapping

import msgspec
import numpy as np
import numpy.typing as npt
import safetensors.numpy

from model_store.archives.archive import Archive, check_tensors, open_archive, read_tensors
from model_store.archives.container import quote_name
from model_store.archives.manifest import (
    FLEETCAST_JSON,
    GRAPH_FILE,
    MAR_MANIFEST,
    CorrelationSpec,
    ForecastSpec,
    GoldenSample,
    Kind,
    MarManifest,
    MarModel,
    Spec,
    Weights,
    encode_record,
)
from model_store.errors import ArchiveInvalid

WEIGHTS_FILE = "weights.safetensors"
ONNX_FILE = "model.onnx"
GOLDEN_FILE = "golden.json"

_EPOCH = (1980, 1, 1, 0, 0, 0)  # the oldest date that a zip can have
_CREATED_ON = "01/01/1980 00:00:00"  # the same in the manifest's own notation, day first
_FILE_MODE = 0o100644 << 16
_UNIX = 3


def pack_archive(spec: Spec, members: Mapping[str, bytes], *, model_name: str, model_version: str = "1.0") -> bytes:
    """Pack `members` (path -> bytes), `fleetcast.json` and a MAR manifest; equal input gives equal bytes.

    A missing `weights.sha256` is filled in. `model_name` and `model_version` are written to the manifest for the tools
    of TorchServe users; the server's name of the model is the archive's key in the store.

    Raises:
        ArchiveInvalid: `open_archive` or `read_tensors` would refuse the result.
    """
    for reserved in (FLEETCAST_JSON, MAR_MANIFEST):
        if reserved in members:
            raise ArchiveInvalid(f"{model_name}: {reserved} is written by packing; leave it out of the members")
    weights = members.get(spec.weights.file)
    if weights is not None and spec.weights.sha256 is None:
        digest = hashlib.sha256(weights).hexdigest()
        spec = msgspec.structs.replace(spec, weights=msgspec.structs.replace(spec.weights, sha256=digest))
    manifest = MarManifest(
        model=MarModel(
            model_name=model_name,
            model_version=model_version,
            handler="fleetcast",
            serialized_file=spec.weights.file,
        ),
        runtime="python",
        created_on=_CREATED_ON,
        archiver_version="fleetcast",
    )
    packed = _build_zip({**members, FLEETCAST_JSON: encode_record(spec), MAR_MANIFEST: encode_record(manifest)})
    archive = open_archive(packed, model_name)
    for name in members.keys() - archive.container.members.keys():
        raise ArchiveInvalid(
            f"{model_name}: the member {quote_name(name)} would be lost; give it a plain relative path"
        )
    _check_readable(archive)
    return packed


def pack_forecaster(
    tensors: Mapping[str, npt.NDArray[np.float32]],
    *,
    architecture: str,
    config: Mapping[str, int | float | str | bool | list[int]],
    model_name: str,
    model_version: str = "1.0",
    forecast: ForecastSpec | None = None,
    golden: GoldenSample | None = None,
    description: str = "",
) -> bytes:
    """Pack a forecaster of the given architecture. `tensors`: its state dict as float32 arrays.

    Raises:
        ArchiveInvalid: a tensor has another dtype or a value that is not finite, or a record breaks a rule.
    """
    spec = Spec(
        kind=Kind.FORECASTER,
        weights=Weights(file=WEIGHTS_FILE),
        architecture=architecture,
        config=dict(config),
        forecast=forecast,
        golden=GOLDEN_FILE if golden else None,
        description=description,
    )
    members = {WEIGHTS_FILE: save_tensors(tensors), **_golden_member(golden)}
    return pack_archive(spec, members, model_name=model_name, model_version=model_version)


def pack_graph(
    graph: bytes,
    tensors: Mapping[str, npt.NDArray[np.float32]],
    *,
    model_name: str,
    model_version: str = "1.0",
    forecast: ForecastSpec | None = None,
    golden: GoldenSample | None = None,
    description: str = "",
) -> bytes:
    """Pack a graph, as `handlers.kinds.graph.export` makes it of a module. `graph` is not checked.

    Raises:
        ArchiveInvalid: a tensor has another dtype or a value that is not finite, or a record breaks a rule.
    """
    spec = Spec(
        kind=Kind.GRAPH,
        weights=Weights(file=WEIGHTS_FILE),
        forecast=forecast,
        golden=GOLDEN_FILE if golden else None,
        description=description,
    )
    members = {GRAPH_FILE: graph, WEIGHTS_FILE: save_tensors(tensors), **_golden_member(golden)}
    return pack_archive(spec, members, model_name=model_name, model_version=model_version)


def pack_onnx(
    model: bytes,
    *,
    model_name: str,
    model_version: str = "1.0",
    forecast: ForecastSpec | None = None,
    golden: GoldenSample | None = None,
    description: str = "",
) -> bytes:
    """Pack an ONNX model, given as the bytes of its `.onnx` file, which are not checked. Raises ArchiveInvalid."""
    spec = Spec(
        kind=Kind.ONNX,
        weights=Weights(file=ONNX_FILE),
        forecast=forecast,
        golden=GOLDEN_FILE if golden else None,
        description=description,
    )
    members = {ONNX_FILE: model, **_golden_member(golden)}
    return pack_archive(spec, members, model_name=model_name, model_version=model_version)


def pack_correlation(
    correlation: CorrelationSpec,
    tensors: Mapping[str, npt.NDArray[np.float32]],
    *,
    model_name: str,
    model_version: str = "1.0",
    description: str = "",
) -> bytes:
    """Pack a correlation, as `handlers.evaluation.correlation` estimates it.

    Raises:
        ArchiveInvalid: the tensors are not those of the record, or one has a value that is not finite.
    """
    spec = Spec(
        kind=Kind.CORRELATION,
        weights=Weights(file=WEIGHTS_FILE),
        correlation=correlation,
        description=description,
    )
    members = {WEIGHTS_FILE: save_tensors(tensors)}
    return pack_archive(spec, members, model_name=model_name, model_version=model_version)


def save_tensors(tensors: Mapping[str, npt.NDArray[np.float32]]) -> bytes:
    """The arrays as safetensors; equal numbers give equal bytes, whatever the memory layout."""
    contiguous = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    saved: bytes = safetensors.numpy.save(contiguous)
    return saved


def _golden_member(golden: GoldenSample | None) -> dict[str, bytes]:
    return {GOLDEN_FILE: encode_record(golden)} if golden else {}


def _build_zip(members: Mapping[str, bytes]) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(members):
            info = zipfile.ZipInfo(name, _EPOCH)
            info.create_system = _UNIX
            info.external_attr = _FILE_MODE
            archive.writestr(info, members[name])
    return packed.getvalue()


def _check_readable(archive: Archive) -> None:
    """Read everything that a server reads. Raises ArchiveInvalid."""
    archive.golden()
    if archive.spec is not None and archive.spec.correlation:
        check_tensors(read_tensors(archive), archive.spec.correlation.tensors, archive.name)
    elif archive.kind in (Kind.FORECASTER, Kind.GRAPH):
        read_tensors(archive)
    else:
        archive.weights()

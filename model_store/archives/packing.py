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

from model_store.archives.archive import Archive, check_tensors, open_archive, read_offsets, read_tensors
from model_store.archives.container import quote_name
from model_store.archives.manifest import (
    FLEETCAST_JSON,
    MAR_MANIFEST,
    GoldenSample,
    MarManifest,
    MarModel,
    Spec,
    encode_record,
)
from model_store.errors import ArchiveInvalid

TENSORS_SUFFIX = ".safetensors"
WEIGHTS_FILE = f"weights{TENSORS_SUFFIX}"
GOLDEN_FILE = "golden.json"

_EPOCH = (1980, 1, 1, 0, 0, 0)  # the oldest date that a zip can have
_CREATED_ON = "01/01/1980 00:00:00"  # the same in the manifest's own notation, day first
_FILE_MODE = 0o100644 << 16
_UNIX = 3


def pack_archive(
    spec: Spec,
    members: Mapping[str, bytes],
    *,
    model_name: str,
    model_version: str = "1.0",
    golden: GoldenSample | None = None,
    description: str = "",
) -> bytes:
    """Pack `members` (path -> bytes), `fleetcast.json` and a MAR manifest; equal input gives equal bytes.

    A missing `weights.sha256` is filled in, and so are `golden` and `description` where they are given. `model_name`
    and `model_version` are written to the manifest for the tools of TorchServe users; the server's name of the model
    is the archive's key in the store.

    Raises:
        ArchiveInvalid: `open_archive` or `read_tensors` would refuse the result.
    """
    for reserved in (FLEETCAST_JSON, MAR_MANIFEST):
        if reserved in members:
            raise ArchiveInvalid(f"{model_name}: {reserved} is written by packing; leave it out of the members")
    if golden is not None:
        spec = msgspec.structs.replace(spec, golden=GOLDEN_FILE)
        members = {**members, GOLDEN_FILE: encode_record(golden)}
    if description:
        spec = msgspec.structs.replace(spec, description=description)
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


def save_tensors(tensors: Mapping[str, npt.NDArray[np.float32]]) -> bytes:
    """The arrays as safetensors; equal numbers give equal bytes, whatever the memory layout."""
    contiguous = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    saved: bytes = safetensors.numpy.save(contiguous)
    return saved


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
    read_offsets(archive)
    assert archive.spec is not None, "it was packed"
    if archive.spec.correlation:
        check_tensors(read_tensors(archive), archive.spec.correlation.tensors, archive.name)
    elif archive.spec.weights.file.endswith(TENSORS_SUFFIX) or archive.spec.architecture:
        read_tensors(archive)
    else:
        archive.weights()

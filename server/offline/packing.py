"""Makes an archive of a network's numbers, a module or an ONNX file, proves it and writes it: `fleetcast pack`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from handlers.codecs.clock import check_zone_name
from handlers.kinds import ArchiveParts, pack_model
from model_store.archives.manifest import GRAPH_FILE, ForecastSpec, Kind, Setting, parse_golden
from model_store.archives.packing import WEIGHTS_FILE
from model_store.errors import ArchiveInvalid
from server.offline.archive_location import ArchiveLocation, locate_archive, settings_of_store, split_location
from server.offline.archive_tools import verify_packed_archive
from server.offline.module_export import ExportRequest, export_module
from server.settings import Settings

Json = str | Path | Mapping[str, Any]  #: JSON text, the path of a file of it, or the object itself
#: Compares a packed archive with the one in its place: the verdict in words. Raises where it must not be written.
CompareArchives = Callable[[ArchiveLocation, bytes], str]


@dataclass(frozen=True, slots=True)
class PackedArchive:
    """What was written, and what was proved of it in words."""

    bytes: int
    proof: str


def pack(
    out: str | Path,
    *,
    architecture: str = "",
    config: Json = "{}",
    weights: str | Path | Mapping[str, Any] | None = None,
    module: str = "",
    inputs: Json = "",
    onnx: str | Path | None = None,
    forecast: Json | None = None,
    golden: Json | None = None,
    name: str = "",
    model_version: str = "1.0",
    description: str = "",
    settings: Settings | None = None,
    compare: CompareArchives | None = None,
) -> PackedArchive:
    """Make an archive and write it to `out`, a path or a store URL, once it loads and answers its golden sample.

    Give `architecture` and `weights` (a state dict, or its safetensors file) for a forecaster, `module`
    (`FILE.py:NAME`) and `inputs` (shapes by name) for a module of your own, or `onnx` alone. `config` has the
    architecture's or the module's options; `forecast` says how a request becomes the network's input; `golden` is a
    request and its answer. Equal input gives equal bytes. `settings` say how the store is reached; `compare` is
    called last.

    Raises:
        ValueError: the arguments do not belong together.
        ArchiveInvalid: a file, an option or an operator is wrong; GoldenMismatch: the answer is another. LoadError,
        OSError: as their message says.
    """
    _check_arguments(architecture, weights, module, inputs, onnx, forecast)
    store, key = split_location(str(out))
    plain = Path(key).name.partition(".")[0]
    kind, parts = _gather_parts(architecture, config, weights, module, inputs, onnx, forecast)
    sample = None if golden is None else parse_golden(_read_json(golden), _name_of("golden", golden))

    def pack_with(*notes: str) -> bytes:
        described = "; ".join(filter(None, notes))
        return pack_model(
            kind, parts, model_name=name or plain, model_version=model_version, golden=sample, description=described
        )

    packed = pack_with(description)
    if "://" not in str(out):
        Path(store).mkdir(parents=True, exist_ok=True)
    location = locate_archive(settings or settings_of_store(store), key)
    proof = verify_packed_archive(packed, key, location.limits)
    if compare is not None:
        verdict = compare(location, packed)
        packed, proof = pack_with(description, verdict), f"{proof}; {verdict}"
    location.source.put(key, packed)
    return PackedArchive(len(packed), proof)


def _check_arguments(architecture: str, weights: Any, module: str, inputs: Json, onnx: Any, forecast: Any) -> None:
    if sum(map(bool, (architecture, module, onnx))) != 1 or (onnx and (weights or forecast)):
        raise ValueError(
            "give --architecture and --weights for a forecaster, --module and --inputs for a module of your own, "
            "or --onnx alone for an ONNX model"
        )
    if bool(module) != bool(inputs):
        raise ValueError(
            "--module and --inputs belong together: what your forward takes, such as --inputs '{\"x\": [8, 168]}'"
        )
    if architecture and weights is None:
        raise ValueError(f"--architecture {architecture} needs its numbers: give a state dict with --weights")


def _gather_parts(
    architecture: str, config: Json, weights: Any, module: str, inputs: Json, onnx: str | Path | None, forecast: Any
) -> tuple[Kind, ArchiveParts]:
    """The kind that the arguments describe, and what its archive is packed of."""
    if onnx is not None:
        return Kind.ONNX, ArchiveParts(program=Path(onnx).read_bytes())
    record = None if forecast is None else _decode_json(forecast, ForecastSpec, _name_of("forecast", forecast))
    if record is not None:
        check_zone_name(record.time_zone)
    if module:
        exported = _export_members(module, config, inputs, weights)
        parts = ArchiveParts(program=exported[GRAPH_FILE], tensors=exported[WEIGHTS_FILE], forecast=record)
        return Kind.GRAPH, parts
    fields = _decode_json(config, dict[str, Setting], "--config")
    tensors = _read_weights(weights)
    return Kind.FORECASTER, ArchiveParts(tensors=tensors, architecture=architecture, config=fields, forecast=record)


def _export_members(module: str, config: Json, inputs: Json, weights: Any) -> dict[str, bytes]:
    """The module imported in a process of its own, called with `config`, given its weights and exported."""
    if isinstance(weights, Mapping):
        raise TypeError("--weights of a module are a file: its process reads them")
    shapes = _decode_json(inputs, dict[str, tuple[int, ...]], "--inputs")
    fields = _decode_json(config, dict[str, Any], "--config")
    return export_module(ExportRequest(module, fields, shapes, None if weights is None else str(weights)))


def _read_weights(weights: str | Path | Mapping[str, Any]) -> bytes | dict[str, Any]:
    """The arrays of a state dict (torch tensors or arrays), or the bytes of a safetensors file."""
    if not isinstance(weights, Mapping):
        return Path(weights).read_bytes()
    return {name: np.asarray(tensor, np.float32) for name, tensor in weights.items()}


def _name_of(what: str, given: Json) -> str:
    """What a message calls this argument: the path of its file, or `what`."""
    return what if isinstance(given, Mapping) else str(given)


def _read_json(given: Json) -> bytes:
    if isinstance(given, Mapping):
        return msgspec.json.encode(given)
    return given.encode() if isinstance(given, str) and given.lstrip().startswith("{") else Path(given).read_bytes()


def _decode_json(given: Json, kind: Any, where: str) -> Any:
    try:
        return msgspec.json.decode(_read_json(given), type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ArchiveInvalid(f"{where}: {error}") from error

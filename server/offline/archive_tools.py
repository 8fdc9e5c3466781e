"""Archives at the desk: packed, looked into, and proved with the very pieces that load them in a worker. No server."""

import hashlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from handlers import kinds
from model_store.archives.archive import Archive, Limits, open_archive
from model_store.archives.manifest import Forecast, GoldenSample, Kind, Spec, Weights, parse_golden
from model_store.archives.packing import GOLDEN_FILE, ONNX_FILE, WEIGHTS_FILE, pack_archive
from model_store.errors import ArchiveInvalid
from model_store.names import ModelName, parse_model_name
from model_store.stores.object_store import Source, open_source
from server.offline.module_export import ExportRequest, export_module
from server.settings import Settings, format_bytes
from server.worker.model_loader import open_store


@dataclass(frozen=True, slots=True)
class Place:
    """Where one archive is or will be: a store and the archive's name in it."""

    source: Source
    name: ModelName
    limits: Limits

    def archive(self) -> tuple[Archive, bytes]:
        """Opened, and its bytes. Raises LoadError."""
        fetched = self.source.get(self.name)
        assert fetched is not None, "only a conditional GET is answered `not modified`"
        return open_archive(fetched.data, self.name, self.limits), fetched.data


def split(where: str) -> tuple[str, ModelName]:
    """A path or URL of one archive -> the store it is in, and its name there. Raises InvalidModelName."""
    if "://" in where:
        store, _, name = where.rpartition("/")
    else:
        path = Path(where).expanduser().resolve()
        store, name = str(path.parent), path.name
    return store, parse_model_name(name)


def place(settings: Settings, name: ModelName) -> Place:
    """The archive `name` of the settings' store. Raises InvalidStoreUrl, StoreDenied."""
    source, limits = open_store(settings)
    return Place(source, name, limits)


def proved(where: Place) -> str:
    """Everything a load does, the golden sample included. What was proved, in words. Raises LoadError."""
    archive, _ = where.archive()
    built = kinds.build(archive)
    golden = "golden sample reproduced" if kinds.prove(archive, built) else "no golden sample"
    return f"{built.summary}, {built.charge_bytes} bytes in memory, {golden}"


def proved_bytes(packed: bytes, name: ModelName, limits: Limits) -> str:
    """`proved` for an archive that is in no store yet."""
    with tempfile.TemporaryDirectory(prefix="fleetcast-") as folder:
        source = open_source(folder)
        source.put(name, packed)
        return proved(Place(source, name, limits))


def pack(
    spec: Spec,
    members: Mapping[str, bytes],
    golden: Path | None,
    *,
    model_name: str,
    model_version: str,
    note: str = "",
) -> bytes:
    """The archive of `spec` and its members, `note` added to its description. Raises ArchiveInvalid, OSError."""
    members = dict(members)
    spec = msgspec.structs.replace(spec, description="; ".join(filter(None, (spec.description, note))))
    if golden is not None:
        sample: GoldenSample = parse_golden(golden.read_bytes(), str(golden))
        spec = msgspec.structs.replace(spec, golden=GOLDEN_FILE)
        members[GOLDEN_FILE] = msgspec.json.encode(sample)
    return pack_archive(spec, members, model_name=model_name, model_version=model_version)


def forecaster_spec(architecture: str, config: str, forecast: Path | None, description: str) -> Spec:
    """`config` is JSON, or the path of a file of it. Raises ArchiveInvalid that names the flag or file, OSError."""
    fields = _decoded(_json(config), dict[str, int | float | str | bool | list[int]], "--config")
    weights = Weights(file=WEIGHTS_FILE)
    return Spec(
        kind=Kind.FORECASTER,
        weights=weights,
        architecture=architecture,
        config=fields,
        forecast=_forecast(forecast),
        description=description,
    )


def onnx_spec(description: str) -> Spec:
    """Of an ONNX archive."""
    return Spec(kind=Kind.ONNX, weights=Weights(file=ONNX_FILE), description=description)


def graph_spec(forecast: Path | None, description: str) -> Spec:
    """Of a graph archive. Raises ArchiveInvalid that names the file, OSError."""
    weights = Weights(file=WEIGHTS_FILE)
    return Spec(kind=Kind.GRAPH, weights=weights, forecast=_forecast(forecast), description=description)


def graph_members(module: str, config: str, inputs: str, weights: Path | None) -> dict[str, bytes]:
    """`FILE.py:NAME` imported in a process of its own, called with `config`, given its weights and exported.

    Raises:
        ArchiveInvalid: the flag, file, or operator that is wrong.
        OSError: a file cannot be read.
    """
    shapes = _decoded(_json(inputs), dict[str, tuple[int, ...]], "--inputs")
    fields = _decoded(_json(config), dict[str, Any], "--config")
    return export_module(ExportRequest(module, fields, shapes, None if weights is None else str(weights)))


def described(archive: Archive, data: bytes) -> dict[str, Any]:
    """What `fleetcast inspect` tells, as plain JSON values. Raises ArchiveInvalid for tensors that cannot be read."""
    spec = archive.spec
    found: dict[str, Any] = {
        "archive": archive.name,
        "kind": str(archive.kind),
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "members": {name: archive.container.members[name].size for name in archive.members},
    }
    if archive.mar is not None:
        found["manifest"] = msgspec.to_builtins(archive.mar)
    if spec is not None:
        found["spec"] = json.loads(msgspec.json.encode(spec))
        found["golden"] = archive.golden() is not None
    return found | kinds.describe(archive)


def lines(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What `described` found for people, a label and a text a line."""
    spec = found.get("spec", {})
    yield "archive", f"{found['archive']}, {format_bytes(found['bytes'])}"
    yield "sha256", found["sha256"]
    yield "kind", f"{found['kind']} {spec.get('architecture', '')}"
    if "manifest" in found:
        model = found["manifest"]["model"]
        yield "manifest", f"{model['modelName']} {model['modelVersion']}, handler {model['handler']}"
    if spec.get("description"):
        yield "description", spec["description"]
    if spec.get("config"):
        yield "config", ", ".join(f"{key} {value}" for key, value in spec["config"].items())
    if "graph" in found:
        graph = found["graph"]
        ((name, shape),) = graph["input"].items()
        yield "graph", f"{graph['family']}, {name} {shape} -> {graph['output']}"
        yield "runs", graph["runs"]
        yield "operators", ", ".join(f"{count} {op}" for op, count in graph["operators"].items())
    yield from _prices(spec)
    if spec:
        yield "golden", "a sample, checked at every load" if found["golden"] else "none"
    for name, size in found["members"].items():
        yield "member", f"{name}, {format_bytes(size)}"
    for name, shape in found.get("tensors", {}).items():
        yield "tensor", f"{name} {shape}"


def _prices(spec: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What is forecast, or whose forecasts are tied together."""
    forecast, correlation = spec.get("forecast"), spec.get("correlation")
    if forecast:
        levels = " ".join(map(str, forecast["quantile_levels"]))
        lengths = f"{forecast['context_length']} -> {forecast['prediction_length']} steps of {forecast['frequency']}"
        yield "forecast", f"{lengths}, quantiles {levels}, {forecast['unit'] or 'no unit'}"
        yield "products", ", ".join(forecast["products"])
        for i, channel in enumerate(forecast["inputs"]):
            yield f"channel {i}", _channel(channel)
    if correlation:
        lengths = f"{correlation['horizon']} steps, {correlation['windows']} windows"
        yield "correlation", f"{correlation['method']}, {lengths}"
        yield "products", ", ".join(correlation["products"])


def _channel(channel: dict[str, Any]) -> str:
    moved = [f"{key} {channel[key]}" for key in ("product", "lag", "shift", "index") if channel[key]]
    return ", ".join([" ".join(filter(None, (channel["source"], channel["feature"]))), *moved])


def _json(text: str) -> bytes:
    """JSON as it stands, or the file of that name."""
    return text.encode() if text.lstrip().startswith("{") else Path(text).read_bytes()


def _forecast(path: Path | None) -> Forecast | None:
    found: Forecast | None = None if path is None else _decoded(path.read_bytes(), Forecast, str(path))
    return found


def _decoded(raw: bytes, kind: Any, where: str) -> Any:
    try:
        return msgspec.json.decode(raw, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ArchiveInvalid(f"{where}: {error}") from error

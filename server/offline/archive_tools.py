"""Describes and verifies archives for `verify`, `inspect` and `pack`, without a server.

Most archives are described without torch, which takes seconds to import; the others and every model that runs need it.
"""

import hashlib
import json
import shlex
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from handlers.codecs.codec import describe_recipe
from model_store.archives.archive import Archive, Limits, list_tensor_shapes, open_archive
from model_store.archives.manifest import Kind, Spec
from model_store.names import ModelName
from server.offline.archive_location import ArchiveLocation
from server.routes.example_requests import NoExample, make_forecast_example
from server.settings import format_bytes

SHOWN = 3  #: numbers of a list in an example
REQUIREMENTS_ADVICE = (
    "by requirements.txt: install these beside the server and pack without it, or --code-requirements install"
)


def verify_archive(location: ArchiveLocation) -> str:
    """Do everything that a load does, including the golden sample. Returns what was verified, in words.

    Raises LoadError.
    """
    archive, _ = location.fetch()
    return _verify_opened(archive)


def verify_packed_archive(packed: bytes, name: ModelName, limits: Limits) -> str:
    """Verify an archive that is in no store yet, as `verify_archive` does. Raises LoadError."""
    return _verify_opened(open_archive(packed, name, limits))


def _verify_opened(archive: Archive) -> str:
    from handlers.model import open_model  # noqa: PLC0415 -- torch

    model = open_model(archive)
    golden = "golden sample reproduced" if model.prove() else "no golden sample"
    return f"{model.built.summary}, {model.built.charge_bytes} bytes in memory, {golden}"


def describe_archive(archive: Archive, data: bytes) -> dict[str, Any]:
    """Describe an archive in plain JSON values for `inspect`. Raises ArchiveInvalid for tensors that cannot be read."""
    spec = archive.spec
    kind, told = _describe_kind(archive)
    found: dict[str, Any] = {
        "archive": archive.name,
        "kind": str(kind),
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "members": {name: archive.container.members[name].size for name in archive.members},
    }
    if archive.mar is not None:
        found["manifest"] = msgspec.to_builtins(archive.mar)
    if spec is not None:
        found["spec"] = json.loads(msgspec.json.encode(spec))
        found["golden"] = archive.golden() is not None
        if spec.forecast is not None:
            found["request"] = describe_recipe(spec.forecast)
            found["example"] = _make_example(found["request"])
    return found | told


def _describe_kind(archive: Archive) -> tuple[Kind, dict[str, Any]]:
    """The archive's kind, and what that says of it beyond its records. Raises LoadError."""
    spec = archive.spec
    if spec is not None and (spec.kind is Kind.CORRELATION or (spec.kind is Kind.FORECASTER and not _has_parts(spec))):
        return spec.kind, {"tensors": list_tensor_shapes(archive)}  # all that their kinds say
    from handlers import kinds  # noqa: PLC0415 -- torch

    return kinds.find_kind(archive).kind, kinds.describe_kind(archive)


def _has_parts(spec: Spec) -> bool:
    return spec.architecture == "mixture"


def _make_example(recipe: dict[str, Any]) -> dict[str, Any] | None:
    try:
        return make_forecast_example(recipe)
    except NoExample:
        return None


def format_description(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Format the result of `describe_archive` as lines of a label and a text."""
    spec = found.get("spec", {})
    yield "archive", f"{found['archive']}, {format_bytes(found['bytes'])}"
    yield "sha256", found["sha256"]
    yield "kind", f"{found['kind']} {spec.get('architecture', '')}"
    if "manifest" in found:
        model = found["manifest"]["model"]
        yield "manifest", f"{model['modelName']} {model['modelVersion']}, handler {model['handler']}"
    if spec.get("description"):
        yield "description", spec["description"]
    if spec.get("trained_until"):
        yield "trained", f"until {spec['trained_until']}"
    if calibration := spec.get("calibration"):
        yield "calibrated", f"by {calibration['windows']} forecasts until {calibration['until']}"
    yield from _list_settings(spec, found.get("mixture", ()))
    if "graph" in found:
        graph = found["graph"]
        ((name, shape),) = graph["input"].items()
        yield "graph", f"{graph['family']}, {name} {shape} -> {graph['output']}"
        yield "runs", graph["runs"]
        yield "operators", ", ".join(f"{count} {op}" for op, count in graph["operators"].items())
    yield from _explain_code(found.get("code", {}))
    yield from _list_prices(spec, found)
    if spec:
        yield "golden", "a sample, checked at every load" if found["golden"] else "none"
    for name, size in found["members"].items():
        yield "member", f"{name}, {format_bytes(size)}"
    for name, shape in found.get("tensors", {}).items():
        yield "tensor", f"{name} {shape}"


def _list_settings(spec: dict[str, Any], parts: Sequence[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    """List the config of a network, and for a mixture each part with its weight."""
    config = spec.get("config", {})
    if config:
        yield "config", ", ".join(f"{key} {value}" for key, value in config.items() if key != "parts")
    for each, part in zip(parts, config.get("parts", ()), strict=False):
        own = ", ".join(f"{key} {value}" for key, value in part.items() if key != "architecture")
        yield "part", f"{each['architecture']}, weight {each['weight']:.3f}{own and f', {own}'}"


def _explain_code(code: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Explain what a code archive would run, and what it needs for that."""
    if "problem" in code:
        yield "code", f"cannot run: {code['problem']}"
    elif code:
        yield "code", f"{code['entry']}: {code['calls']}"
        yield "batches", code["batches"]
        for name, what in code["model_files"].items():
            yield "model file", f"{name}: {what}"
        yield "runs", code["runs"]
        yield "needs", f"{', '.join(code['needs'])}, which are installed here"
        for missing in code["missing"]:
            yield "missing", missing
        if code["requirements"]:
            yield (
                "requires",
                REQUIREMENTS_ADVICE,
            )
        for line in code["requirements"]:
            yield "requires", line
        yield "serve", shlex.join(["fleetcast", "serve", *code["flags"]])


def _list_prices(spec: dict[str, Any], found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """List what the model forecasts, or the products whose forecasts it correlates."""
    forecast, correlation = spec.get("forecast"), spec.get("correlation")
    if forecast:
        levels = " ".join(map(str, forecast["quantile_levels"]))
        lengths = f"{forecast['context_length']} -> {forecast['prediction_length']} steps of {forecast['frequency']}"
        yield "forecast", f"{lengths}, quantiles {levels}, {forecast['unit'] or 'no unit'}"
        yield "history", f"{found['request']['history_length']} steps of `target`, the oldest first"
        yield "clock", f"{forecast['time_zone']}, forecasts start at {forecast.get('origin', 'any time')}"
        yield "covariates", ", ".join(forecast["dynamic_feat"]) or "none"
        if "residual_to" in forecast:
            yield "residual to", f"{forecast['residual_to']}: what the network forecasts is added to it"
        levels = forecast["quantile_levels"]
        rule = f"{forecast['tail']} beyond the levels {levels[0]:g} and {levels[-1]:g}"
        if tails := forecast.get("tails"):
            low, high = tails["band"]
            reach = f"{tails['low']:g} and {tails['high']:g} widths of the band {low:g} to {high:g}"
            rule = f"{rule}, by {reach} in the mean"
        yield "tails", rule
        yield "products", ", ".join(forecast["products"])
        if found["example"] is not None:
            yield "example", json.dumps(_shorten(found["example"]))
        for i, channel in enumerate(forecast["inputs"]):
            yield f"channel {i}", _format_channel(channel)
    if correlation:
        lengths = f"{correlation['horizon']} steps, {correlation['windows']} windows"
        yield "correlation", f"{correlation['method']}, {lengths}"
        yield "products", ", ".join(correlation["products"])


def _shorten(example: Any) -> Any:
    """The example with its long lists cut; `--json` has them whole."""
    if isinstance(example, dict):
        return {key: _shorten(value) for key, value in example.items()}
    if isinstance(example, list) and len(example) > SHOWN and not isinstance(example[0], list | dict):
        return [*example[:SHOWN], f"... {len(example)} in all"]
    return [_shorten(each) for each in example] if isinstance(example, list) else example


def _format_channel(channel: dict[str, Any]) -> str:
    moved = [f"{key} {channel[key]}" for key in ("product", "lag", "shift", "index") if channel[key]]
    return ", ".join([" ".join(filter(None, (channel["source"], channel["feature"]))), *moved])

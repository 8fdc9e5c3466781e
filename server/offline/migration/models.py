"""Models: which are loaded at the start, and what the file says of single ones. Pure."""

from collections.abc import Sequence
from pathlib import PurePosixPath
from urllib.parse import urlencode

import msgspec

from model_store.names import InvalidModelName, parse_model_name
from server.offline.migration.configuration import Configuration
from server.offline.migration.outcome import Outcome, become, hold, ignore, leave

_ENDINGS = (".tar.gz", ".tgz", ".mar", ".model")
_MOST_NAMED = 8


class ModelRecord(msgspec.Struct, rename="camel"):
    """What the file says of one version of a model; the rest is the old server's own."""

    mar_name: str = ""
    default_version: bool = False
    batch_size: int = 0
    max_batch_delay: int = 0
    response_timeout: int = 0


class _Snapshot(msgspec.Struct):
    models: dict[str, dict[str, ModelRecord]] = {}


_MODELS = msgspec.json.Decoder(dict[str, dict[str, ModelRecord]])
_SNAPSHOT = msgspec.json.Decoder(_Snapshot)


def read_model_records(config: Configuration) -> list[ModelRecord]:
    """Every version of every model of `models` or `model_snapshot`. Raises ValueError for other JSON."""
    return [record for _, _, record in _list_records(config)]


def _list_records(config: Configuration) -> list[tuple[str, str, ModelRecord]]:
    models, snapshot = config.get("models"), config.get("model_snapshot")
    try:
        found = _SNAPSHOT.decode(snapshot).models if snapshot else _MODELS.decode(models or "{}")
    except (msgspec.MsgspecError, RecursionError) as error:
        raise ValueError(f"`models` is no JSON object of models, versions and their settings: {error}") from None
    return [(name, version, record) for name, versions in found.items() for version, record in versions.items()]


def set_loaded_models(config: Configuration) -> Outcome:
    """Models that the old server loads at its start are pinned: loaded at the start, and never evicted."""
    asked = [each.strip() for each in config.get("load_models").split(",") if each.strip()]
    if not asked or asked == ["none"]:
        return hold("no model is loaded before it is asked for")
    if len(asked) == 1 and asked[0].lower() == "all":
        return hold(
            "every archive of the store is served: its first request loads it. `pin` loads at the start, and keeps"
        )
    keys, notes = [], []
    for each in asked:
        name, _, file = each.rpartition("=")
        problem = _find_problem(file)
        if problem:
            notes.append(problem)
            continue
        keys.append(file)
        notes += _explain_name(name or _strip_ending(file), file)
    settings = {"pin": keys} if keys else {}
    return leave("; ".join(notes), settings) if notes else become(settings)


def _explain_name(name: str, file: str) -> list[str]:
    """How clients name a model: by its key, of which .mar may be left out, or as it is registered."""
    if file == f"{name}.mar":
        return []
    return [f"{name} is asked for by its key {file}, unless it is registered after a start: {_register(name, file)}"]


def _register(name: str, file: str) -> str:
    query = urlencode({"url": file, "model_name": name, "initial_workers": 1}, safe="/")
    return f"curl -X POST 'http://127.0.0.1:8081/models?{query}'"


def _find_problem(file: str) -> str:
    if "://" in file:
        return f"{file}: download it into the store, archives come from no other URL"
    try:
        parse_model_name(file)
    except InvalidModelName as error:
        return f"{file} is no key of a store: {error}"
    return ""


def _strip_ending(file: str) -> str:
    name = PurePosixPath(file).name
    return next((name.removesuffix(ending) for ending in _ENDINGS if name.endswith(ending)), name)


def set_model_defaults(config: Configuration) -> Outcome:
    """What single models are to have is in their archives here. A snapshot's models were loaded: they are pinned.

    Raises ValueError.
    """
    records = _list_records(config)
    if not records:
        return hold("it says nothing of any model")
    notes = [note for name, version, record in records if (note := _explain_record(name, version, record))]
    if len(notes) > _MOST_NAMED:
        notes = [*notes[:_MOST_NAMED], f"and {len(notes) - _MOST_NAMED} more models"]
    is_snapshot = bool(config.get("model_snapshot"))
    keys = _list_default_files([record for _, _, record in records]) if is_snapshot else []
    settings = {"pin": keys} if keys else {}
    if notes:
        advice = "register it with batch_size and max_batch_delay, or pack it with a model-config.yaml that says "
        return leave(advice + "; ".join(notes), settings)
    if settings:
        return become(settings)
    return ignore("workers are not counted per model: an archive with code has one process")


def _explain_record(name: str, version: str, record: ModelRecord) -> str:
    """What the archive's model-config.yaml should say; empty where it is what an archive has without one."""
    wanted = {"batchSize": record.batch_size, "maxBatchDelay": record.max_batch_delay}
    if record.batch_size <= 1:
        return ""
    return f"{', '.join(f'{key}: {value}' for key, value in wanted.items())} (for {name} {version})"


def _list_default_files(records: Sequence[ModelRecord]) -> list[str]:
    files = [record.mar_name for record in records if record.default_version and record.mar_name]
    return [file for file in dict.fromkeys(files) if not _find_problem(file)]

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
MOST_WORKERS = 64  #: of one model


class ModelRecord(msgspec.Struct, rename="camel"):
    """What the file says of one version of a model; the rest is the old server's own."""

    mar_name: str = ""
    default_version: bool = False
    min_workers: int = 0
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
    """Models that the old server loads at its start: registered at the start, and pinned, which is never evicted."""
    asked = [each.strip() for each in config.get("load_models").split(",") if each.strip()]
    if not asked or asked == ["none"]:
        return hold("no model is loaded before it is asked for")
    if config.get("model_snapshot"):
        return hold("the old server loads what the snapshot says, and nothing else")
    if len(asked) == 1 and asked[0].lower() == "all":
        return hold(
            "every archive of the store is served: its first request loads it. `pin` loads at the start, and keeps"
        )
    keys, queries, notes = [], [], []
    for each in asked:
        name, _, file = each.rpartition("=")
        problem = _find_problem(file)
        if problem:
            notes.append(problem)
            continue
        keys.append(file)
        queries += _list_queries(name, file, config)
    settings = {"register_models": queries, "pin": list(dict.fromkeys(keys))} if keys else {}
    return leave("; ".join(notes), settings) if notes else become(settings)


def _list_queries(name: str, file: str, config: Configuration) -> list[str]:
    """How a model of `load_models` is registered: as `models` says it, else by its name alone."""
    records = [
        (model, version, record)
        for model, version, record in _list_records(config)
        if model == name or (record.mar_name or f"{model}.mar") == file
    ]
    if not records:
        return [_register(file, name, "", ModelRecord(), config)]
    return [_register(file, name or model, version, record, config) for model, version, record in records]


def _register(file: str, name: str, version: str, record: ModelRecord, config: Configuration) -> str:
    """The query that registers a model; what is as it would be without is left out."""
    default = config.get("default_workers_per_model")
    workers = record.min_workers or (int(default) if default.isdigit() else 0) or 1
    said = {
        "url": file,
        "model_name": "" if name in ("", _strip_ending(file)) else name,
        "model_version": version,
        "initial_workers": min(workers, MOST_WORKERS),
        "batch_size": record.batch_size if record.batch_size > 1 else "",
        "max_batch_delay": record.max_batch_delay if record.batch_size > 1 else "",
        "response_timeout": record.response_timeout or "",
        "default_version": "true" if record.default_version else "",
    }
    return urlencode({key: value for key, value in said.items() if value != ""}, safe="/")


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
    """What single models are to have is said when they are registered. A snapshot's models were loaded.

    Raises ValueError.
    """
    records = _list_records(config)
    if not records:
        return hold("it says nothing of any model")
    if config.get("model_snapshot"):
        return _set_snapshot(records, config)
    loaded = config.get("load_models")
    if loaded and loaded.strip().lower() not in ("all", "none"):
        return become({}, "of models of load_models: it is in register_models")
    notes = [note for name, version, record in records if (note := _explain_record(name, version, record))]
    if len(notes) > _MOST_NAMED:
        notes = [*notes[:_MOST_NAMED], f"and {len(notes) - _MOST_NAMED} more models"]
    if notes:
        advice = "register it with batch_size and max_batch_delay, or pack it with a model-config.yaml that says "
        return leave(advice + "; ".join(notes))
    return ignore("workers are not counted per model: an archive with code has one process")


def _set_snapshot(records: Sequence[tuple[str, str, ModelRecord]], config: Configuration) -> Outcome:
    """All its versions are registered at the start, those that answer by default last."""
    notes, queries = [], []
    for name, version, record in sorted(records, key=lambda each: each[2].default_version):
        file = record.mar_name or f"{name}.mar"
        problem = _find_problem(file)
        if problem:
            notes.append(problem)
        else:
            queries.append(_register(file, name, version, record, config))
    keys = _list_default_files([record for _, _, record in records])
    settings = {"register_models": queries} | ({"pin": keys} if keys else {})
    return leave("; ".join(notes), settings) if notes else become(settings)


def _explain_record(name: str, version: str, record: ModelRecord) -> str:
    """What the archive's model-config.yaml should say; empty where it is what an archive has without one."""
    wanted = {"batchSize": record.batch_size, "maxBatchDelay": record.max_batch_delay}
    if record.batch_size <= 1:
        return ""
    return f"{', '.join(f'{key}: {value}' for key, value in wanted.items())} (for {name} {version})"


def _list_default_files(records: Sequence[ModelRecord]) -> list[str]:
    files = [record.mar_name for record in records if record.default_version and record.mar_name]
    return [file for file in dict.fromkeys(files) if not _find_problem(file)]

"""The schema of a load run's JSON; its errors name the place in the file that does not fit."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import msgspec

try:
    from hdrh.histogram import HdrHistogram  # type: ignore[import-untyped]
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError("the load tester needs hdrhistogram: pip install 'fleetcast[load]'") from missing

Column = list[float | None]  #: one value per row of time; None for missing ones


class NotAResult(ValueError):
    """The data is not the JSON of a load run; the message says where."""


Latency = TypedDict(
    "Latency",
    {
        "count": int,
        "p50_ms": float,
        "p90_ms": float,
        "p99_ms": float,
        "p99.9_ms": float,
        "max_ms": float,
        "hdr": str,
    },
)
Latency.__doc__ = "Percentiles, and in `hdr` the whole distribution of microseconds, encoded."


class OverTime(TypedDict):
    """Measurements of the driver by intended time; all lists have one length."""

    t_s: list[float]
    due_per_s: Column
    answered_per_s: Column
    failed_per_s: Column
    p50_ms: Column
    p99_ms: Column
    max_ms: Column
    hit_ratio: Column


class ServerOverTime(TypedDict):
    """Metrics of the server during the run; all lists have one length."""

    t_s: list[float]
    hit_ratio: Column
    loads_per_s: dict[str, Column]
    load_ms: dict[str, Column]
    evictions_per_s: Column
    loaded_models: Column
    cache_bytes: Column
    queue_ms: Column
    batch_rows: Column


class Metrics(TypedDict):
    """The increase of the server's counters during the run."""

    hit_ratio: float | None
    loads_from_store: float
    load_seconds_from_store: float
    loads_from_disk: float
    load_seconds_from_disk: float
    evictions: float


class Buckets(TypedDict):
    """A histogram: `count[i]` loads took at most `le_s[i]` and more than the one before; the last has no limit."""

    le_s: Column
    count: list[float]


class Check(TypedDict):
    """One limit of the SLO and its result."""

    what: str
    limit: str
    found: str
    met: bool


class SloResult(TypedDict):
    """The results of the SLO."""

    met: bool
    checks: list[Check]


class Step(TypedDict):
    """One rate of a ramp."""

    rate: float
    answered_per_s: float
    p50_ms: float | None
    p99_ms: float | None
    failed: int
    sustained: bool
    why: str


class ForecastResults(TypedDict):
    """The forecasts in calls for many models: requested, failed, answered a second, requested per call (mean)."""

    calls: NotRequired[int]  #: missing in older records
    asked: int
    failed: int
    per_s: float
    per_call: float


class Results(TypedDict):
    """The results of a load run."""

    title: str
    subject: str
    profile: dict[str, Any]
    dialect: str
    body: str
    body_bytes: int
    encoding: NotRequired[str]  #: of calls for many models; missing in older records
    processes: int
    invalid: list[str]
    requests: int
    seconds: float
    answered_per_s: float
    hit_ratio: float | None
    latency: dict[str, Latency]
    lag: Latency
    over_time: OverTime
    failures: dict[str, int]
    said: NotRequired[dict[str, str]]  #: by status, the words of one such answer; missing in older records
    forecasts: NotRequired[ForecastResults | None]  #: missing in older records
    checked: int
    unsound: list[Any]
    metrics: Metrics | None
    server_over_time: ServerOverTime | None
    load_time: dict[str, Buckets] | None
    memory: dict[str, float] | None
    memory_over_time: dict[str, Column] | None
    slo: SloResult | None
    steps: list[Step] | None


class Record(TypedDict):
    """The file of a load run."""

    date: str
    commit: str
    seed: int
    machine: dict[str, Any]
    results: Results


def load_record(path: Path) -> Record:
    """Load the record of a load run. Raises OSError, and NotAResult with the place that does not fit."""
    try:
        return check_record(msgspec.json.decode(path.read_bytes()))
    except (msgspec.DecodeError, NotAResult) as wrong:
        raise NotAResult(f"{path} is not what `fleetcast-load run` writes: {wrong}") from wrong


def check_record(found: Mapping[str, Any]) -> Record:
    """Return `found` as a checked record of a load run. Raises NotAResult."""
    try:
        record = msgspec.convert(found, Record)
    except msgspec.ValidationError as wrong:
        raise NotAResult(str(wrong)) from wrong
    results = record["results"]
    for name, row in {**results["latency"], "lag": results["lag"]}.items():
        try:
            decode_histogram(row)
        except Exception as wrong:  # hdrh raises errors of base64, zlib and ctypes beside its own
            raise NotAResult(f"the HDR histogram of `{name}` cannot be decoded: {wrong!r}") from wrong
    _check_columns("over_time", results["over_time"])
    if (server := results["server_over_time"]) is not None:
        _check_columns("server_over_time", server)
        _check_columns("server_over_time.loads_per_s", {"t_s": server["t_s"], **server["loads_per_s"]})
        _check_columns("server_over_time.load_ms", {"t_s": server["t_s"], **server["load_ms"]})
    if (memory := results["memory_over_time"]) is not None:
        if None in memory.get("t_s", [None]):
            raise NotAResult("`memory_over_time` has no times `t_s`")
        _check_columns("memory_over_time", memory)
    for tier, buckets in (results["load_time"] or {}).items():
        _check_columns(f"load_time.{tier}", buckets)
    return record


def decode_histogram(row: Latency) -> HdrHistogram:
    """Decode a histogram of microseconds."""
    return HdrHistogram.decode(row["hdr"])


def _check_columns(where: str, columns: Mapping[str, object]) -> None:
    lengths = {name: len(column) for name, column in columns.items() if isinstance(column, Sequence)}
    if len(set(lengths.values())) > 1:
        raise NotAResult(f"the columns of `{where}` differ in length: {lengths}")

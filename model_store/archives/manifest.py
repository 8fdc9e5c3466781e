"""The records of an archive: `fleetcast.json`, the MAR manifest, and the golden sample. Pure; records are frozen.

`parse_*` checks types, ranges and the rules across fields; an error names the file and the field. The constructor of a
record checks only the rules across fields. Packing checks the rest, because it parses its own result.
"""

from enum import StrEnum
from itertools import pairwise
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from model_store.archives.step_budget import StepBudget
from model_store.errors import ArchiveInvalid, ArchiveTooLarge

FLEETCAST_JSON = "fleetcast.json"
MAR_MANIFEST = "MAR-INF/MANIFEST.json"
GRAPH_FILE = "graph.json"  #: the operators of a graph archive; `handlers.kinds.graph` defines its content
MAX_PRODUCTS, MAX_HORIZON = 2000, 2500  #: limits of a correlation: its factors have at most 16 and 25 MB
MAX_ROWS, MAX_LEVELS, MAX_FIELDS = 10_000, 1000, 1000  #: channels or covariates; quantile levels; of `config`
MAX_TAIL = 1000.0  #: most widths of its band that the prices beyond an outer level are away from it in the mean
MAX_GOLDEN_DEPTH = 64  #: how deep the JSON of a golden sample nests
#: Values of one record. The parser holds the interpreter until it is done: 4.7 s for 1.4 million empty lists.
MAX_VALUES = 100_000

Name = Annotated[str, Meta(min_length=1, max_length=200)]
Feature = Literal[
    "hour_sin", "hour_cos", "weekday_sin", "weekday_cos", "year_sin", "year_cos", "weekend",
    "monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday", "",
]  # fmt: skip
TimeOfDay = Annotated[str, Meta(pattern=r"^([01]\d|2[0-3]):[0-5]\d$")]
Stamp = Annotated[str, Meta(pattern=r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d$")]
MemberPath = Annotated[str, Meta(min_length=1, max_length=500)]
Sha256 = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
Length = Annotated[int, Meta(ge=1, le=1_000_000)]
Level = Annotated[float, Meta(gt=0.0, lt=1.0)]
Numbers = Annotated[list[int], Meta(max_length=MAX_ROWS)]
PartSettings = Annotated[dict[str, int | float | str | bool | Numbers], Meta(max_length=MAX_FIELDS)]
#: The value of a field of `config`; lists of objects are the parts of a mixture.
Setting = int | float | str | bool | Annotated[list[int | PartSettings], Meta(max_length=MAX_ROWS)]
T = TypeVar("T", bound=Struct)


class Kind(StrEnum):
    """How an archive runs: `forecaster` and `graph` as rows of banks, `onnx` as a session, `code` in a child process.

    A `correlation` is no forecaster: it describes how the forecasts of several models depend on each other.
    """

    FORECASTER = "forecaster"
    GRAPH = "graph"
    ONNX = "onnx"
    CODE = "code"
    CORRELATION = "correlation"


class Scaler(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Maps a price y to the network's number z = (y - center) / scale; `asinh` takes asinh of that.

    The inverse maps quantiles back. It is increasing, so that quantiles keep their order.
    """

    kind: Literal["identity", "linear", "asinh"] = "identity"
    center: float = 0.0
    scale: Annotated[float, Meta(gt=0.0)] = 1.0


class InputChannel(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One input channel of the network over the context: for context step t it holds the source at t - lag + shift.

    `target`: the scaled target of `product` (lag >= 0, never shifted: the future is unknown). `dynamic_feat`: row
    `index` of the request's known-future covariates, scaled by `scaler`; shifted by the prediction length, its last
    column is the covariate of the last forecast step. `calendar`: `feature` of the time stamp, usually shifted
    likewise. `static`: row `index` of the request's `cat` as a number. `seed`: the request's seed and `item_id` as two
    numbers in the first two columns, from which a network that samples makes its noise.
    """

    source: Literal["target", "dynamic_feat", "calendar", "static", "seed"]
    lag: Annotated[int, Meta(ge=0, le=1_000_000)] = 0
    shift: Annotated[int, Meta(ge=0, le=1_000_000)] = 0
    index: Annotated[int, Meta(ge=0, le=10_000)] = 0
    product: Annotated[int, Meta(ge=0, le=10_000)] = 0
    feature: Feature = ""
    scaler: Scaler = Scaler()

    def __post_init__(self) -> None:
        """Cross-field rules."""
        if self.source == "target" and self.shift:
            raise ValueError("a target channel cannot be shifted: the future target is unknown; use lag")
        if self.source != "target" and self.product:
            raise ValueError(f"a {self.source} channel has no `product`: only targets are of one")
        if (self.source == "calendar") != bool(self.feature):
            raise ValueError(f"a {self.source} channel {'needs' if self.source == 'calendar' else 'has no'} `feature`")


class Tails(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The tail rule `exponential`: how far prices lie beyond the outer quantiles, learnt from past errors.

    `low` and `high`: the mean distance below the first level and above the last one, in widths of the forecast's own
    band between the levels `band`. `beyond`: the number of past prices that lay there.
    """

    low: Annotated[float, Meta(ge=0.0, le=MAX_TAIL)]
    high: Annotated[float, Meta(ge=0.0, le=MAX_TAIL)]
    band: tuple[Level, Level]
    beyond: tuple[Annotated[int, Meta(ge=0)], Annotated[int, Meta(ge=0)]] = (0, 0)


class Fallback(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The forecast of an archive whose history says too little: the price of the last known day at this time.

    Rows have one number for each level, in network numbers. `near`: quantiles of the errors that this naive forecast
    had; `far`: those where the last known day is a week ago. `usual`: quantiles of all prices by hour of the day, or
    one row, where no day is known.
    """

    near: tuple[float, ...]
    far: tuple[float, ...]
    usual: Annotated[tuple[tuple[float, ...], ...], Meta(min_length=1, max_length=24)]


class HistoryRules(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a history of the archive usually looks like, learnt from the rows it was fitted to; what is not is marked.

    `max_missing`: the share of its steps that may be missing. `fill`: what missing steps take, the last known value or
    that of the nearest day. `flat_steps`, `stale_steps`: so many steps at the end that have one value, or repeat the
    day before, are unusual. `low`, `high`: the range of prices; `least_span`: the least distance of a
    history's highest and lowest. `profile`: the mean course of a day [24] as a unit
    vector, empty if days have none; `shift_gain`: how much better a history may fit it at another hour.
    `fallback`: what is answered where a history says too little; without it the network answers.
    """

    flat_steps: Annotated[int, Meta(ge=2)]
    stale_steps: Annotated[int, Meta(ge=1)]
    low: float
    high: float
    least_span: Annotated[float, Meta(ge=0.0)] = 0.0
    max_missing: Annotated[float, Meta(ge=0.0, le=1.0)] = 0.25
    fill: Literal["last", "seasonal"] = "seasonal"
    profile: Annotated[tuple[float, ...], Meta(max_length=24)] = ()
    shift_gain: float = 2.0
    fallback: Fallback | UnsetType = UNSET

    def __post_init__(self) -> None:
        """Cross-field rules."""
        if self.low >= self.high:
            raise ValueError(f"history.low {self.low} is not below history.high {self.high}")
        if len(self.profile) not in (0, 24):
            raise ValueError(f"history.profile has {len(self.profile)} hours; a day has 24")


class ForecastSpec(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a forecast request must contain, and how it becomes the network's input.

    Lengths are in steps of `frequency` (pandas offset alias, such as `1h` or `5min`); `floor` and `cap` in `unit`, for
    every product. An archive of D > 1 `products` takes `target` as [D][T], and its network gives [prediction, D,
    levels] or, the same numbers in the same order, [prediction, D * levels]: for each step all levels of the first
    product, then those of the next. Where their prices differ in size, `scalers` has one for each instead of `scaler`.

    A network that samples gives [prediction, paths] scenarios instead of quantiles; `quantile_levels` are then the
    default of a request. `origin`: the time of day of the first forecast step, for a model that was trained for this
    time only; the request is refused if it starts at another one.

    `tail` says where samples beyond the outer levels lie: nowhere (`none`, it cannot be sampled), on the outer
    quantiles (`clamp`), or as `tails` says (`exponential`). Quantiles at the levels are the same with each.

    `residual_to`: the covariate that forecasts the same price, such as an operator's own forecast. The target channels
    and the network's numbers are then deviations of the price from it, and `scaler` is of these.
    """

    frequency: Name
    context_length: Length
    prediction_length: Length
    quantile_levels: Annotated[tuple[Level, ...], Meta(max_length=MAX_LEVELS)]
    inputs: Annotated[tuple[InputChannel, ...], Meta(max_length=MAX_ROWS)]
    time_zone: Name = "UTC"
    products: Annotated[tuple[Name, ...], Meta(max_length=MAX_PRODUCTS)] = ("price",)
    dynamic_feat: Annotated[tuple[Name, ...], Meta(max_length=MAX_ROWS)] = ()
    cat: Annotated[tuple[Name, ...], Meta(max_length=MAX_ROWS)] = ()
    unit: str = ""
    floor: float | None = None
    cap: float | None = None
    scaler: Scaler = Scaler()
    scalers: Annotated[tuple[Scaler, ...], Meta(max_length=MAX_PRODUCTS)] = ()
    pad_context: bool = False
    tail: Literal["none", "clamp", "exponential"] = "none"
    tails: Tails | UnsetType = UNSET
    history: HistoryRules | UnsetType = UNSET
    paths: Annotated[int, Meta(ge=2, le=10_000)] | UnsetType = UNSET  # not written if unset, like `origin`
    origin: TimeOfDay | UnsetType = UNSET
    residual_to: Name | UnsetType = UNSET

    def __post_init__(self) -> None:
        """Cross-field rules."""
        levels = self.quantile_levels
        if not levels or any(a >= b for a, b in pairwise(levels)):
            raise ValueError(f"quantile_levels must be increasing and not empty, not {list(levels)}")
        if not self.inputs:
            raise ValueError("inputs must name at least one channel")
        self._check_products()
        if self.paths and len(self.products) > 1:
            raise ValueError("paths are of one product")
        if self.residual_to and (len(self.products) > 1 or self.residual_to not in self.dynamic_feat):
            raise ValueError(f"residual_to {self.residual_to!r} must be a covariate of an archive of one product")
        if self.paths and not self.trained_levels[0] <= levels[0] <= levels[-1] <= self.trained_levels[-1]:
            raise ValueError(f"{self.paths} paths tell nothing of the levels {levels[0]} and {levels[-1]}")
        self._check_tails()
        self._check_history()
        if self.floor is not None and self.cap is not None and self.floor >= self.cap:
            raise ValueError(f"floor {self.floor} is not below cap {self.cap}")
        for i, channel in enumerate(self.inputs):
            width = {"dynamic_feat": len(self.dynamic_feat), "static": len(self.cat)}.get(channel.source)
            if width is not None and channel.index >= width:
                raise ValueError(f"inputs[{i}].index is {channel.index}, but there are {width} {channel.source} rows")
            if channel.shift > self.prediction_length:
                raise ValueError(
                    f"inputs[{i}].shift is {channel.shift}, but {self.prediction_length} steps are forecast"
                )

    def _check_products(self) -> None:
        names = self.products
        if not names or len(set(names)) < len(names):
            raise ValueError(f"products must be different and not empty, not {list(names)}")
        if self.scalers and len(names) == 1:
            raise ValueError("scalers is for archives of several products; give the one of one product as `scaler`")
        if self.scalers and len(self.scalers) != len(names):
            raise ValueError(f"scalers has {len(self.scalers)} scalers for {len(names)} products")
        if self.scalers and self.scaler != Scaler():
            raise ValueError("scaler and scalers exclude each other")
        for i, channel in enumerate(self.inputs):
            if channel.product >= len(names):
                raise ValueError(f"inputs[{i}].product is {channel.product}, but there are {len(names)} products")

    def _check_tails(self) -> None:
        tails = self.tails
        if (self.tail == "exponential") != bool(tails):
            raise ValueError("`tails` belongs to the tail rule exponential, and it needs them")
        if tails and self.paths:
            raise ValueError("a network that samples has the tails of its paths, not `tails`")
        if tails and not (tails.band[0] < tails.band[1] and set(tails.band) <= set(self.quantile_levels)):
            raise ValueError(f"tails.band {list(tails.band)} must be two of the levels {list(self.quantile_levels)}")

    def _check_history(self) -> None:
        rules = self.history
        if not rules:
            return
        if len(self.products) > 1:
            raise ValueError("`history` belongs to archives of one product")
        fallback = rules.fallback
        if fallback and self.paths:
            raise ValueError("a network that samples has no quantiles, and therefore no `history.fallback`")
        rows = [fallback.near, fallback.far, *fallback.usual] if fallback else []
        if any(len(row) != len(self.quantile_levels) or any(a > b for a, b in pairwise(row)) for row in rows):
            raise ValueError(f"rows of history.fallback must rise, with {len(self.quantile_levels)} levels")
        if fallback and len(fallback.usual) not in (1, 24):
            raise ValueError(f"history.fallback.usual has {len(fallback.usual)} rows, not 24 or one")

    @property
    def product_scalers(self) -> tuple[Scaler, ...]:
        """The scaler of each product."""
        return self.scalers or (self.scaler,) * len(self.products)

    @property
    def trained_levels(self) -> tuple[float, ...]:
        """The levels of the network's last axis: of its quantiles, or of its sorted paths."""
        if not self.paths:
            return self.quantile_levels
        return tuple((i + 0.5) / self.paths for i in range(self.paths))

    @property
    def history_length(self) -> int:
        """How many target steps a request must contain: the context and the longest lag before it."""
        return self.context_length + max(channel.lag for channel in self.inputs)


class CorrelationSpec(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How forecast errors of N products, `horizon` steps T ahead, depend on each other (kind `correlation`).

    `products` are the names by which a call's forecasts are matched: the models' names, or `model#product` for a model
    of several products. `gaussian`: tensors `product_factor` [N, N] and `time_factor` [T, T], each the lower Cholesky
    factor of a correlation matrix; the whole correlation is their Kronecker product. `schaake`: the tensor `ranks`
    [windows, N, T], which has for every product and step the ranks 0 to windows - 1 of past windows. `windows`: the
    number of past windows; `shrinkage`: the share of each matrix that was replaced by the identity.
    """

    products: Annotated[tuple[Name, ...], Meta(min_length=1, max_length=MAX_PRODUCTS)]
    horizon: Annotated[int, Meta(ge=1, le=MAX_HORIZON)]
    method: Literal["gaussian", "schaake"]
    windows: Length
    shrinkage_products: Annotated[float, Meta(ge=0.0, le=1.0)] = 0.0
    shrinkage_time: Annotated[float, Meta(ge=0.0, le=1.0)] = 0.0

    def __post_init__(self) -> None:
        """Cross-field rules."""
        if len(set(self.products)) < len(self.products):
            raise ValueError("products must be different names")
        if self.method == "schaake" and (self.shrinkage_products or self.shrinkage_time):
            raise ValueError("shrinkage belongs to the method gaussian")

    @property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """The names and shapes of its tensors."""
        products, horizon = len(self.products), self.horizon
        if self.method == "schaake":
            return {"ranks": (self.windows, products, horizon)}
        return {"product_factor": (products, products), "time_factor": (horizon, horizon)}


class Weights(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The member that holds the numbers: `model.onnx` for onnx, safetensors for every other kind."""

    file: MemberPath
    sha256: Sha256 | None = None


class Calibration(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How far the quantile levels of a forecast are shifted, learnt from its past errors.

    `file`: the member, safetensors with the tensor `offsets` [rows, levels], in widths of the band between the levels
    `low` and `high`. It has a row for each hour of the day, or one row for all steps; for D > 1 products it is
    [D, rows, levels]. Of sample paths, the levels are `quantile_levels`, and a path moves by the offset of its rank
    among the paths. `windows`: the number of past forecasts it was learnt from; the last one ended at `until`, on the
    archive's wall clock.
    """

    file: MemberPath
    sha256: Sha256
    low: Level
    high: Level
    windows: Length
    until: Stamp


class GoldenSample(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A request and its expected answer, which are checked on every load of the archive.

    `request` and `response` are JSON bodies as clients send and receive them (`content_type` application/json). Numbers
    may differ by `abs_tolerance + rel_tolerance * |expected|`.
    """

    request: dict[str, Any]
    response: dict[str, Any]
    abs_tolerance: Annotated[float, Meta(ge=0.0)] = 1e-4
    rel_tolerance: Annotated[float, Meta(ge=0.0)] = 1e-3


class Spec(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`fleetcast.json`, the description of an archive. The architecture's own module validates `config`.

    Kind forecaster: `architecture`, `config`, `weights`, and `forecast` if it answers forecast requests; without it the
    archive answers tensors only. Kind graph: `weights`, the member `graph.json`, and `forecast` likewise. Kind
    correlation: `weights` and `correlation`.

    `trained_until`: the stamp of the last step that the fit has used, its holdout included, on the wall clock of the
    forecast; windows up to it are no test of the archive. `trained_epochs`: what `--epochs` was, 0 the default;
    `trained_half_life`: what `--half-life` was, in days, not written if off. `fingerprint`: a hash of all that the fit
    depended on.
    """

    kind: Kind
    weights: Weights
    format: Literal[1] = 1
    architecture: str = ""
    config: Annotated[dict[str, Setting], Meta(max_length=MAX_FIELDS)] = {}
    forecast: ForecastSpec | None = None
    correlation: CorrelationSpec | UnsetType = UNSET  # not written if unset: archives of other kinds keep their bytes
    golden: MemberPath | None = None
    description: Annotated[str, Meta(max_length=2000)] = ""
    trained_until: Stamp | UnsetType = UNSET
    trained_epochs: Annotated[float, Meta(ge=0.0)] | UnsetType = UNSET
    trained_half_life: Annotated[float, Meta(gt=0.0)] | UnsetType = UNSET
    fingerprint: Sha256 | UnsetType = UNSET
    calibration: Calibration | UnsetType = UNSET

    def __post_init__(self) -> None:
        """Cross-field rules."""
        if self.kind is Kind.FORECASTER and not self.architecture:
            raise ValueError("a forecaster needs `architecture`")
        if self.kind is not Kind.FORECASTER and (self.architecture or self.config):
            raise ValueError(f"`architecture` and `config` belong to forecasters, not to kind {self.kind}")
        if (self.kind is Kind.CORRELATION) != bool(self.correlation):
            raise ValueError(f"`correlation` belongs to archives of that kind, and only to them; this is a {self.kind}")
        if self.correlation and (self.forecast or self.golden):
            raise ValueError("a correlation has no `forecast` and no `golden`: it answers nothing itself")
        if self.calibration:
            self._check_calibration(self.calibration)

    def _check_calibration(self, calibration: Calibration) -> None:
        forecast = self.forecast
        if self.kind not in (Kind.FORECASTER, Kind.GRAPH):
            raise ValueError(f"`calibration` belongs to forecasters and graphs, not to kind {self.kind}")
        if forecast is None:
            raise ValueError("`calibration` belongs to archives with a `forecast`")
        levels = forecast.quantile_levels
        if not (calibration.low < calibration.high and {calibration.low, calibration.high} <= set(levels)):
            band = f"{calibration.low} to {calibration.high}"
            raise ValueError(f"the calibration's band {band} must be two of the levels {list(levels)}")


class MarModel(Struct, frozen=True, kw_only=True, rename="camel"):
    """The `model` object of a MAR manifest; unused fields are ignored."""

    model_name: str = ""
    model_version: str = ""
    handler: str = ""
    serialized_file: str = ""
    model_file: str = ""  #: of archives with code; kept so that a packed manifest has the same bytes


class MarManifest(Struct, frozen=True, kw_only=True, rename="camel"):
    """`MAR-INF/MANIFEST.json` as torch-model-archiver and model-archiver (MMS) write it."""

    model: MarModel
    runtime: str = ""
    created_on: str = ""
    archiver_version: str = ""
    model_server_version: str | UnsetType = UNSET  # only model-archiver (MMS) writes it, never we


def parse_spec(raw: bytes) -> Spec:
    """`fleetcast.json`. Raises ArchiveInvalid that names the field."""
    return _parse_record(raw, Spec, FLEETCAST_JSON)


def parse_mar_manifest(raw: bytes) -> MarManifest:
    """`MAR-INF/MANIFEST.json`. Raises ArchiveInvalid that names the field."""
    return _parse_record(raw, MarManifest, MAR_MANIFEST)


def parse_golden(raw: bytes, member: str) -> GoldenSample:
    """The golden sample stored as `member`. Raises ArchiveInvalid that names the field, ArchiveTooLarge."""
    sample = _parse_record(raw, GoldenSample, member)
    try:
        _check_json((sample.request, sample.response))
    except ArchiveInvalid as error:
        raise type(error)(f"{member}: {error}") from None
    return sample


def count_values(raw: bytes, file: str) -> None:
    """Count a record's JSON values before it is parsed: commas and opening brackets, those in strings too.

    Raises ArchiveTooLarge.
    """
    try:
        StepBudget(MAX_VALUES, "values").spend(raw.count(b",") + raw.count(b"[") + raw.count(b"{"))
    except ArchiveTooLarge as error:
        raise ArchiveTooLarge(f"{file}: {error}") from None


def _check_json(value: object) -> None:
    """That JSON is one that every reader and writer of ours can handle, without recursion.

    Raises ArchiveInvalid where it nests too deep, or has an integer beyond 64 bits.
    """
    level: list[Any] = [value]
    for _ in range(MAX_GOLDEN_DEPTH):
        inner: list[Any] = []
        for each in level:
            for one in each.values() if isinstance(each, dict) else each:
                if isinstance(one, (dict, list)):
                    inner.append(one)
                elif isinstance(one, int) and not -(2**63) <= one < 2**64:
                    raise ArchiveInvalid(f"an integer has {one.bit_length()} bits; 64 are the most")
        level = inner
    if level:
        raise ArchiveInvalid(f"it nests deeper than {MAX_GOLDEN_DEPTH} levels")


def encode_record(record: Spec | MarManifest | GoldenSample) -> bytes:
    """The record as deterministic, readable JSON: parsing it gives an equal record."""
    return msgspec.json.format(msgspec.json.encode(record, order="sorted"), indent=1) + b"\n"


def _parse_record(raw: bytes, record: type[T], file: str) -> T:
    count_values(raw, file)
    try:
        return msgspec.json.decode(raw, type=record)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ArchiveInvalid(f"{file}: {error}") from error

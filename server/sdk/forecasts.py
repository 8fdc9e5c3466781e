"""Forecast requests and answers as Python values, for a server and for a model in process alike. Imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from importlib import import_module
from typing import Any, Literal, Self

import msgspec

from server.sdk.frames import list_times, read_frame

OutputType = Literal["mean", "quantiles", "samples"]
#: The time stamp of the first value of `target`: on the clock of the archive's zone, or with an offset an instant.
Start = str | datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class ForecastRequest:
    """One time series and the model that forecasts it.

    `target` [T] is the history, the oldest value first; None and NaN are missing values. An archive of several products
    takes [D][T]. `dynamic_feat` has a row [T + prediction length] for each covariate that the archive names. Sequences
    may be lists, tuples, or anything with a `tolist` or `to_list` (numpy arrays, series of pandas and polars). `step`
    is not sent: with it an answer can say the time of each of its steps.
    """

    model: str = ""
    target: Any
    start: Start
    cat: Sequence[int] | None = None
    dynamic_feat: Any = None
    item_id: str | int | None = None
    step: timedelta | None = None

    @classmethod
    def from_frame(
        cls,
        frame: Any,
        *,
        model: str = "",
        target: str | Sequence[str],
        time: str | None = None,
        dynamic_feat: Sequence[str] = (),
        steps_ahead: int = 0,
        cat: Sequence[int] | None = None,
        item_id: str | int | None = None,
    ) -> Self:
        """A request from a table: of pandas, of polars, or a mapping of columns. The oldest row is the first.

        `target` is a column, or one of each product; `time` the column of time stamps, by default pandas' index.
        `dynamic_feat` are columns known ahead, and the last `steps_ahead` rows are the steps to forecast, whose targets
        are not read. Empty targets are missing values. Raises ValueError that names column and row.
        """
        found = read_frame(frame, target=target, time=time, dynamic_feat=dynamic_feat, steps_ahead=steps_ahead)
        return cls(
            model=model,
            target=found.target,
            start=found.start,
            step=found.step,
            dynamic_feat=found.dynamic_feat,
            cat=cat,
            item_id=item_id,
        )

    def to_instance(self) -> dict[str, Any]:
        """The request as the JSON object of CONTRACTS 5, without the model."""
        start = format_start(self.start)
        optional = {"cat": self.cat, "dynamic_feat": self.dynamic_feat, "item_id": self.item_id}
        present = {name: value for name, value in optional.items() if value is not None}
        return {"start": start, "target": self.target, **present}


@dataclass(frozen=True, slots=True, kw_only=True)
class ForecastOptions:
    """What an answer holds. Without options: the mean, and the quantiles that the archive was trained for.

    `quantiles` are levels between 0 and 1. `num_samples` adds so many sample paths; the same `seed` gives the same.
    `correlation` names the archive that correlates the forecasts of one call: sample s is then one scenario of all.
    """

    quantiles: Sequence[float | str] | None = None
    num_samples: int = 0
    seed: int | None = None
    correlation: str | None = None
    output_types: Sequence[OutputType] | None = None

    def to_configuration(self) -> dict[str, Any]:
        """The options as the JSON object `configuration` of CONTRACTS 5."""
        types = self.output_types or (("mean", "quantiles", "samples") if self.num_samples else None)
        optional = {
            "output_types": types,
            "quantiles": None if self.quantiles is None else [str(level) for level in self.quantiles],
            "num_samples": self.num_samples or None,
            "seed": self.seed,
            "correlation": self.correlation,
            "joint": True if self.correlation else None,
        }
        return {name: value for name, value in optional.items() if value is not None}


class ForecastResult(msgspec.Struct, frozen=True):
    """A forecast of H steps; what was not asked for is None. Of several products each [H] is [D][H].

    `start` is the time stamp of the first forecast step, on the clock of `time_zone`; `quantiles` has a row [H] by
    level as text, `samples` [S][H]. Where the request's `start` had an offset, H counts real steps: 23 or 25 hours on a
    day when the clock changes.
    """

    start: str | None = None
    mean: list[Any] | None = None
    quantiles: dict[str, list[Any]] | None = None
    samples: list[Any] | None = None
    item_id: str | int | None = None
    time_zone: str | None = None
    step: timedelta | None = None  #: of the request, where it had one; not of the wire

    def quantile(self, level: float | str) -> list[Any]:
        """The quantile of a level, [H]. Raises KeyError that says which there are."""
        found = {float(name): values for name, values in (self.quantiles or {}).items()}
        try:
            return found[float(level)]
        except KeyError:
            raise KeyError(
                f"no quantile {level}; the forecast has {', '.join(self.quantiles or {}) or 'none'}"
            ) from None

    def to_columns(self, step: timedelta | None = None) -> dict[str, list[Any]]:
        """A table of H rows as columns: `time`, `mean`, each level by its text, `sample_0` and so on.

        Of several products each has a column: `mean[0]`, `mean[1]`. Raises ValueError without `step`, which a request
        from a table brings.
        """
        step = step or self.step
        if step is None or self.start is None:
            raise ValueError("the distance of the steps is not known: say it, such as step=timedelta(hours=1)")
        series = {"mean": self.mean} if self.mean is not None else {}
        series |= self.quantiles or {}
        series |= {f"sample_{i}": path for i, path in enumerate(self.samples or ())}
        columns: dict[str, list[Any]] = {}
        for name, values in series.items():
            several = bool(values) and isinstance(values[0], list)
            columns |= {f"{name}[{d}]": row for d, row in enumerate(values)} if several else {name: values}
        count = max(map(len, columns.values()), default=0)
        return {"time": list_times(self.start, self.time_zone, step, count), **columns}

    def to_pandas(self, step: timedelta | None = None) -> Any:
        """`to_columns` as a pandas DataFrame. Raises ModuleNotFoundError where pandas is not installed."""
        return import_module("pandas").DataFrame(self.to_columns(step))

    def to_polars(self, step: timedelta | None = None) -> Any:
        """`to_columns` as a polars DataFrame. Raises ModuleNotFoundError where polars is not installed."""
        return import_module("polars").DataFrame(self.to_columns(step))


class _ForecastAnswer(msgspec.Struct):
    predictions: list[ForecastResult]


_ANSWER = msgspec.json.Decoder(_ForecastAnswer)


def format_start(start: Start) -> str:
    """A start as requests have it."""
    return start.isoformat(" ", "seconds") if isinstance(start, datetime) else start


def _list_values(value: Any) -> Any:
    """Of numpy, pandas and polars. Raises AttributeError for what is none of them."""
    return value.to_list() if hasattr(value, "to_list") else value.tolist()


_ENCODER = msgspec.json.Encoder(enc_hook=_list_values)  # NaN becomes null


def encode_json(value: Any) -> bytes:
    """JSON of plain values, arrays and ForecastRequests' fields. Raises TypeError for a value that has no JSON."""
    try:
        return _ENCODER.encode(value)
    except AttributeError as error:
        raise TypeError(f"a request cannot hold such a value: {error}") from None


def encode_instances(requests: Sequence[ForecastRequest], options: ForecastOptions) -> bytes:
    """The body of a request to one model."""
    instances = [request.to_instance() for request in requests]
    return encode_json({"instances": instances, "configuration": options.to_configuration()})


def decode_predictions(answer: bytes) -> list[ForecastResult]:
    """One model's answer. Raises msgspec.ValidationError where it is not one of forecasts."""
    return _ANSWER.decode(answer).predictions

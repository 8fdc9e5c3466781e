"""Forecast requests and answers as Python values, for a server and for a model in process alike. Imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

import msgspec

OutputType = Literal["mean", "quantiles", "samples"]
#: The time stamp of the first value of `target`: on the clock of the archive's zone, or with an offset an instant.
Start = str | datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class ForecastRequest:
    """One time series and the model that forecasts it.

    `target` [T] is the history, the oldest value first; None and NaN are missing values. An archive of several products
    takes [D][T]. `dynamic_feat` has a row [T + prediction length] for each covariate that the archive names. Sequences
    may be lists, tuples, or anything with a `tolist` (numpy arrays, pandas series).
    """

    model: str = ""
    target: Any
    start: Start
    cat: Sequence[int] | None = None
    dynamic_feat: Any = None
    item_id: str | int | None = None

    def to_instance(self) -> dict[str, Any]:
        """The request as the JSON object of CONTRACTS 5, without the model."""
        start = self.start.isoformat(" ", "seconds") if isinstance(self.start, datetime) else self.start
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


class _ForecastAnswer(msgspec.Struct):
    predictions: list[ForecastResult]


_ANSWER = msgspec.json.Decoder(_ForecastAnswer)
_ENCODER = msgspec.json.Encoder(enc_hook=lambda value: value.tolist())  # of numpy and pandas; NaN becomes null


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

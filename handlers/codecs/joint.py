"""The requests of a loaded correlation archive: it turns the marginals of several forecasts into joint scenarios.

Imports no torch.

A body is `{"forecasts": [{"name", "marginal"}, ...], "num_samples"?, "seed"?}`: a front collects it from the models'
answers to `output_types: ["marginal"]`, and any client may send one. The answer is `{"samples": [...]}` with [S][T] of
each forecast, [S][D][T] of one of several products; as npy it is one array [S, N, T] of all products in order. With
`"sizes": true` the JSON begins with `"sizes"`, the bytes of the samples of each forecast, between which there is one
comma: a front cuts the answer there and need not read it.
"""

import secrets
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Generic, TypeVar, cast

import msgspec
import numpy as np
import simdjson
from msgspec import Meta, Struct

from handlers.base import Float32
from handlers.codecs import open_inference
from handlers.codecs.codec import JSON, LINES, NPY, NUMBER_S, Encoded, negotiate_media
from handlers.codecs.deepar_schema import NumSamples, Seed, parse_start
from handlers.codecs.features import Float64
from handlers.codecs.scenarios import (
    CorrelationModel,
    Marginal,
    draw_scenarios,
    draw_scenarios_each,
    match_marginals,
    refuse_repeated,
)
from handlers.codecs.tails import ExponentialTails
from handlers.codecs.tensors import encode_in_blocks, write_json, write_npy
from handlers.errors import RequestError, UnsupportedMedia
from model_store.archives.json_faults import FAULTS, explain_fault
from model_store.archives.manifest import MAX_TAIL

MAX_FORECASTS = 10_000
MAX_JUMPS = 100  #: most changes of a clock within one forecast
PAIRED = "configuration.joint"  #: the field of a fault that lies between forecasts
FLOPS_PER_S = 1e9  #: assumed speed of the scores, computed one product after another
ROOM_SPARED = 1.05  #: how much longer the text of later samples may be than that of the first ones without a new copy
NUMBER_TEXT = b"0123456789+-.eE \t\n\r"  #: what numbers are written with, and what lies between them

Values = TypeVar("Values")
#: As they are sent. An array of float64 [D, T, levels] stands for them where they are plain.
Lists = Annotated[list[Annotated[list[list[float]], Meta(min_length=1)]], Meta(min_length=1)]


class MarginTails(Struct, forbid_unknown_fields=True):
    """The tail rule `exponential` of a forecast, see `handlers.codecs.tails`; `band` are places among the levels."""

    low: Annotated[float, Meta(ge=0.0, le=MAX_TAIL)]
    high: Annotated[float, Meta(ge=0.0, le=MAX_TAIL)]
    band: tuple[Annotated[int, Meta(ge=0)], Annotated[int, Meta(ge=0)]]
    floor: float | None = None
    cap: float | None = None


class Margins(Struct, Generic[Values], forbid_unknown_fields=True):
    """A forecast's quantiles: `values` [D][T][levels] of its D products, whose names are left out if it has one.

    Forecasts are paired by time: `start` is the instant of the first step, with an offset. Without any, all start at
    once. `jumps` has the steps, counted in slots of a wall clock, at which this clock changes, and by how many seconds.
    """

    levels: Annotated[list[float], Meta(min_length=1, max_length=1000)]
    values: Values
    products: list[str] = []
    start: str | None = None
    step_s: Annotated[int, Meta(ge=1)] = 0
    jumps: Annotated[list[tuple[int, int]], Meta(max_length=MAX_JUMPS)] = []
    tails: MarginTails | None = None


class MarginalForecast(Struct, Generic[Values], forbid_unknown_fields=True):
    """One model's forecast: `name` is its name in the correlation, `name#product` for several products."""

    name: str
    marginal: Margins[Values]


class JointBody(Struct, Generic[Values], forbid_unknown_fields=True):
    """The body of a request."""

    forecasts: Annotated[list[MarginalForecast[Values]], Meta(min_length=1, max_length=MAX_FORECASTS)]
    num_samples: NumSamples = 100
    seed: Seed | None = None
    sizes: bool = False


@dataclass(frozen=True, slots=True)
class JointRequest:
    """A checked request: the marginals of all products in order, and the form of the answer."""

    marginals: Sequence[Marginal]
    widths: Sequence[int]  #: products of each forecast; 0 for a single one without a name
    samples: int
    seed: int
    media: str
    sizes: bool = False  #: whether the bytes of each forecast's samples are wanted ahead of them
    description: bytes = b""  #: the answer itself, where it was asked what the archive is


@dataclass(frozen=True, slots=True)
class JointCall:
    """A decoded request. `n` is one, as of every request for a single."""

    feeds: JointRequest
    n: int = 1
    flops: int = 0  #: estimate for its scores

    @property
    def numbers(self) -> int:
        """The number of values in all scenarios together."""
        return self.feeds.samples * sum(len(marginal.values) for marginal in self.feeds.marginals)

    @property
    def seconds(self) -> float | None:
        """Estimate the seconds to draw and write the scenarios."""
        return self.flops / FLOPS_PER_S + self.numbers * NUMBER_S

    @staticmethod
    def encode(answer: Encoded) -> Encoded:
        """Return the answer, which the model has already encoded."""
        return answer


class JointModel:
    """A correlation as a single; its requests share no work that could be done together."""

    def __init__(self, correlation: CorrelationModel) -> None:
        self.correlation = correlation
        self.charge_bytes = correlation.charge_bytes

    def __repr__(self) -> str:
        return f"<JointModel {self.correlation!r}>"

    def run_all(self, requests: Sequence[JointRequest]) -> list[Encoded]:
        """Answer each request."""
        return [self.run(asked) for asked in requests]

    def run(self, asked: JointRequest) -> Encoded:
        """Answer one request."""
        if asked.description:
            return asked.description, JSON
        if asked.media == NPY:
            return write_npy(draw_scenarios(asked.marginals, self.correlation, asked.samples, asked.seed)), NPY
        found = iter(draw_scenarios_each(asked.marginals, self.correlation, asked.samples, asked.seed))
        samples = (_split_products(found, width) if width else next(found) for width in asked.widths)
        return _write_samples(samples, asked), JSON


class JointCodec:
    """Reads requests for one correlation archive."""

    quick_bytes = 2**16  #: of a body that is not plain every quantile becomes an object of Python

    def __init__(self, correlation: CorrelationModel) -> None:
        self._correlation = correlation
        self._decoder, self._quick_decoder = _make_decoders()
        products = {"products": correlation.products}
        self._description = open_inference.describe_tensors(open_inference.Signature({}, {}), correlation=products)

    def __repr__(self) -> str:
        return f"<JointCodec {self._correlation!r}>"

    def decode(self, body: bytes | memoryview, content_type: str, accept: str) -> JointCall:
        """Decode body and headers (empty if absent) of a request. Raises RequestError that names instance and field."""
        if content_type == open_inference.DESCRIBE:
            return JointCall(JointRequest((), (), 0, 0, JSON, description=self._description))
        sent, wanted = negotiate_media(content_type, accept)
        if sent != JSON or wanted == LINES:
            raise UnsupportedMedia(f"marginals are sent as {JSON}, scenarios asked as {JSON} or {NPY}", field="accept")
        request = self._read(body)
        refuse_repeated(_names(request))  # before work is done for ten thousand
        marginals, owners = list[Marginal](), list[int]()
        for i, (forecast, first) in enumerate(zip(request.forecasts, pair_starts(request.forecasts), strict=True)):
            marginals += _parse_marginals(i, forecast, first)
            owners += [i] * (len(marginals) - len(owners))
        try:
            places = match_marginals(marginals, self._correlation, request.num_samples, equal_steps=wanted == NPY)
        except RequestError as bad:
            owner = None if bad.instance is None else owners[bad.instance]
            raise RequestError(bad.message, instance=owner, field=bad.field) from None
        widths = [len(forecast.marginal.products) for forecast in request.forecasts]
        seed = secrets.randbits(53) if request.seed is None else request.seed
        asked = JointRequest(marginals, widths, request.num_samples, seed, wanted, request.sizes)
        return JointCall(asked, flops=self._correlation.flops(places, request.num_samples))

    def _read(self, body: bytes | memoryview) -> JointBody[Any]:
        """Read a body; the values of a forecast are arrays if all are plain. Raises RequestError."""
        try:
            quick: JointBody[Any] = self._quick_decoder.decode(body)
            arrays = [_read_plain(each.marginal) for each in quick.forecasts]
            if not any(each is None for each in arrays):
                for forecast, values in zip(quick.forecasts, arrays, strict=True):
                    forecast.marginal.values = values
                return quick
            return self._decoder.decode(body)
        except FAULTS as error:
            raise RequestError(f"not a request for joint scenarios: {explain_fault(error)}") from error


@cache
def _make_decoders() -> tuple[msgspec.json.Decoder[JointBody[Lists]], msgspec.json.Decoder[JointBody[msgspec.Raw]]]:
    """Make the decoder of any body, and the one that leaves the values of forecasts as they are."""
    return msgspec.json.Decoder(JointBody[Lists]), msgspec.json.Decoder(JointBody[msgspec.Raw])


def _read_plain(margins: Margins[msgspec.Raw]) -> Float64 | None:
    """Read values as an array [D, T, levels] without an object for each; None for those that are not as plain as that.

    Without its numbers, the text of an array is brackets and commas that follow from its shape.
    """
    text, products, levels = bytes(margins.values), max(1, len(margins.products)), len(margins.levels)
    try:
        found = simdjson.Parser().parse(text)
        if not isinstance(found, simdjson.Array):
            return None
        numbers = np.frombuffer(found.as_buffer(of_type="d"), np.float64)
    except (ValueError, TypeError, RuntimeError):
        return None
    steps, rest = divmod(len(numbers), products * levels)
    if rest or not steps or text.translate(None, NUMBER_TEXT) != _list_borders(products, steps, levels):
        return None
    return numbers.reshape(products, steps, levels)


def _list_borders(*shape: int) -> bytes:
    """The brackets and commas of an array of this shape."""
    inner = b""
    for size in reversed(shape):
        inner = b"[" + b",".join([inner] * size) + b"]"
    return inner


def _names(request: JointBody[Any]) -> Iterator[tuple[int, str]]:
    """Yield the name of each product, with the index of its forecast."""
    for i, forecast in enumerate(request.forecasts):
        for product in forecast.marginal.products or [""]:
            yield i, f"{forecast.name}#{product}" if forecast.marginal.products else forecast.name


def pair_starts(forecasts: Sequence[MarginalForecast[Any]]) -> list[int]:
    """Return the step of the call at which each forecast starts: 0 for the earliest.

    Raises RequestError for steps of different lengths or times, and for forecasts that do not overlap; it names the
    models and their starts.
    """
    if all(each.marginal.start is None for each in forecasts):
        return [0] * len(forecasts)
    starts = [_parse_instant(i, each) for i, each in enumerate(forecasts)]
    first, step_s = starts.index(min(starts)), forecasts[0].marginal.step_s
    found = []
    for i, (each, start) in enumerate(zip(forecasts, starts, strict=True)):
        steps, rest = divmod(start - starts[first], max(1, each.marginal.step_s))
        if each.marginal.step_s != step_s:
            one, other = (f"{it.name} has steps of {it.marginal.step_s} s" for it in (forecasts[0], each))
            raise RequestError(f"{one}, but {other}; joint forecasts have equal steps", instance=i, field=PAIRED)
        if rest:
            what = f"{_name_start(forecasts[first])} and {_name_start(each)} have no step at the same time"
            raise RequestError(what, instance=i, field=PAIRED)
        found.append(steps)
    last, ends = found.index(max(found)), [at + _count_steps(each) for at, each in zip(found, forecasts, strict=True)]
    if found[last] >= min(ends):
        early = forecasts[ends.index(min(ends))]
        what = f"{_name_start(early)} ends before {_name_start(forecasts[last])}; joint forecasts must overlap"
        raise RequestError(what, instance=last, field=PAIRED)
    _refuse_other_jumps(forecasts, found)
    return found


def _refuse_other_jumps(forecasts: Sequence[MarginalForecast[Any]], firsts: Sequence[int]) -> None:
    """Refuse forecasts between which a clock changes for one alone: after it, equal steps are at different times.

    This is a forecast in slots beside one in real steps, or beside one in a zone whose clock does not change then.
    Raises RequestError that names both models and their starts.
    """
    jumps = [
        {(at + first, by) for at, by in each.marginal.jumps} for each, first in zip(forecasts, firsts, strict=True)
    ]
    ends = [first + _count_steps(each) for each, first in zip(forecasts, firsts, strict=True)]
    some = next((i for i, each in enumerate(jumps) if each), None)
    if some is None:
        return
    for i, each in enumerate(jumps):
        if {jump for jump in jumps[some] if jump[0] < ends[i]} != {jump for jump in each if jump[0] < ends[some]}:
            what = f"{_name_start(forecasts[some])} counts slots of a clock that changes within it"
            other = (
                f"{_name_start(forecasts[i])} does not change its clock then, so that their steps are not at one time"
            )
            raise RequestError(
                f"{what}, and {other}; send all `start`s of that day with an offset", instance=i, field=PAIRED
            )


def _parse_instant(i: int, forecast: MarginalForecast[Any]) -> int:
    """Parse the start of a forecast into seconds since 1970. Raises RequestError."""
    start = forecast.marginal.start
    if start is None:
        raise RequestError(
            f"{forecast.name} has no start, but other forecasts have", instance=i, field="marginal.start"
        )
    if not forecast.marginal.step_s:
        raise RequestError(f"{forecast.name} has a start, but no step_s", instance=i, field="marginal.step_s")
    moment = parse_start(start)
    if moment.tzinfo is None:
        raise RequestError("expected a time with an offset such as +01:00", instance=i, field="marginal.start")
    return round(moment.timestamp())


def _name_start(forecast: MarginalForecast[Any]) -> str:
    return f"{forecast.name} from {forecast.marginal.start} ({_count_steps(forecast)} steps)"


def _count_steps(forecast: MarginalForecast[Any]) -> int:
    return len(forecast.marginal.values[0])


def _parse_marginals(i: int, forecast: MarginalForecast[Any], first: int) -> Iterator[Marginal]:
    """Parse the products of a forecast. Raises RequestError for numbers that are not quantiles."""
    found = forecast.marginal
    names = [f"{forecast.name}#{product}" for product in found.products] or [forecast.name]
    if len(found.values) != len(names):
        what = f"{len(found.values)} rows of values for {len(names)} products"
        raise RequestError(what, instance=i, field="marginal.values")
    levels = np.array(found.levels)
    if not (levels[0] > 0 and levels[-1] < 1 and (np.diff(levels) > 0).all()):
        raise RequestError("levels must rise within 0 and 1", instance=i, field="marginal.levels")
    tails = _parse_tails(i, found)
    for name, rows in zip(names, found.values, strict=True):
        if not isinstance(rows, np.ndarray) and any(len(row) != len(levels) for row in rows):
            what = f"every step of {name} must have {len(levels)} values, one for each level"
            raise RequestError(what, instance=i, field="marginal.values")
        if len(rows) != len(found.values[0]):
            what = f"{name} has {len(rows)} steps and {names[0]} {len(found.values[0])}; products have equal steps"
            raise RequestError(what, instance=i, field="marginal.values")
        values = np.asarray(rows)
        if not (np.abs(values) <= np.finfo(np.float32).max).all() or (np.diff(values) < 0).any():
            raise RequestError(f"values of {name} must be finite and sorted", instance=i, field="marginal.values")
        yield Marginal(name, levels, values, first, tails)


def _parse_tails(i: int, found: Margins[Any]) -> ExponentialTails | None:
    """Parse the tail rule of a forecast; None for flat tails. Raises RequestError."""
    tails = found.tails
    if tails is None:
        return None
    if not tails.band[0] < tails.band[1] < len(found.levels):
        what = f"expected the places of two of the {len(found.levels)} levels, the lower one first"
        raise RequestError(what, instance=i, field="marginal.tails.band")
    if tails.floor is not None and tails.cap is not None and tails.floor > tails.cap:
        raise RequestError("floor lies above cap", instance=i, field="marginal.tails.floor")
    return ExponentialTails(tails.low, tails.high, tails.band, tails.floor, tails.cap)


def _write_samples(samples: Iterable[Float32], asked: JointRequest) -> bytes:
    """Write the samples of each forecast, and their sizes ahead of them if they are asked for.

    They are written into memory of about the size that the first ones let expect. What is joined afterwards takes twice
    the memory, which the system would have to clear with each request.
    """
    numbers, sizes = sum(len(each.values) for each in asked.marginals) * asked.samples, list[int]()
    room = b",".join([b"%10d" % 0] * len(asked.widths))  # of sizes that are known when all is written
    head = b'{"sizes":[%b],"samples":[' % room if asked.sizes else b'{"samples":['
    body, at = bytearray(), 0
    for each in samples:
        text = write_json(encode_in_blocks(each))
        sizes.append(len(text))
        if not at:
            at = len(head)
            body = bytearray(at + int(len(text) * (numbers / each.size) * ROOM_SPARED) + len(asked.widths) + 2)
        body[at : at + len(text)] = text
        at += len(text) + 1
        body[at - 1 : at] = b","
    if asked.sizes:
        head = head.replace(room, b",".join([b"%10d" % size for size in sizes]))
    body[: len(head)] = head
    body[at - 1 :] = b"]}"
    return cast("bytes", body)  # not copied: all that send it take any buffer


def _split_products(found: Iterator[Float32], width: int) -> Float32:
    """Reshape the samples [S, T] of products to [S, D, T]."""
    return np.stack([next(found) for _ in range(width)], axis=1)

"""Decodes request bodies into arrays and encodes outputs: a codec for families, a codec for singles. No torch.

A codec belongs to one loaded archive and holds no state of a request. Every wrong request is a RequestError, every
wrong output a RunFailed; no other exception is raised for any bytes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from math import prod
from types import MappingProxyType
from typing import Protocol

import msgspec
import numpy as np

from handlers.base import Float32, Shape
from handlers.codecs import open_inference, open_inference_requests, tensors
from handlers.codecs.calibration import AnsweredLevels, BandCalibration
from handlers.codecs.datatypes import BYTES, FP32, Array, find_not_finite, nest_values, read_values
from handlers.codecs.deepar import DeepAr
from handlers.codecs.deepar_schema import SHOWN_NAMES
from handlers.codecs.features import parse_step_seconds
from handlers.codecs.marks import NO_MARKS, Marks
from handlers.codecs.tensors import Place, check_finite, put_rows
from handlers.errors import RequestError, RunFailed, UnsupportedMedia
from handlers.work import RequestBudget
from model_store.archives.manifest import ForecastSpec

JSON = "application/json"
NPY = "application/x-npy"
LINES = "application/jsonlines"
MEDIA = (JSON, NPY, LINES)
QUICK_BYTES = 2**20  #: largest body that is decoded quickly
NUMBER_S = 5e-7  #: about the seconds to draw a number and write it as JSON
Encoded = tuple[bytes, str]  #: body, content type
OURS = "application/vnd.fleetcast."  #: media types between front and worker: `handlers.codecs.open_inference`
OUTPUT = "predictions"  #: the name of a family's output
#: Tensors of the Open Inference Protocol of an archive that forecasts: one request and its answer in DeepAR JSON.
DEEPAR_INPUT, DEEPAR_OUTPUT = "request", "response"
DEEPAR = open_inference.Signature(
    {DEEPAR_INPUT: (1,)}, {DEEPAR_OUTPUT: (1,)}, {DEEPAR_INPUT: BYTES, DEEPAR_OUTPUT: BYTES}, has_rows=False
)
DEEPAR_ROWS = replace(DEEPAR, has_rows=True)  #: as it may be sent: MLServer's codec of text gives it the axis of rows


class Tensor(Protocol):
    """The input and output shapes of a family, which its requests must fit."""

    @property
    def input_name(self) -> str:
        """The input's name in tensor JSON."""

    @property
    def input_shape(self) -> Shape:
        """Of one row, without batch axis."""

    @property
    def output_shape(self) -> Shape:
        """Of one row, without batch axis."""


class DecodedCall(
    msgspec.Struct, frozen=True, gc=False
):  # part of no cycle; made in a tenth of the time that a frozen dataclass takes
    """A decoded request for a family: rows [n, *input_shape], and the encoder of outputs [n, *output_shape].

    Rows that were decoded to a place lie there and have its shape.

    `encode` raises RunFailed if the outputs are not finite, but for JSON Lines it encodes an error for each such line.
    `numbers` is about the number of values in a forecast's answer, and 0 for tensors. `answered`: the levels that
    `encode` has answered, where the codec keeps them. `marks` say what a forecast is to be doubted for.
    """

    rows: Float32
    encode: Callable[[Float32], Encoded]
    numbers: int = 0
    answered: Sequence[AnsweredLevels] = ()
    marks: Marks = NO_MARKS

    @property
    def seconds(self) -> float:
        """Estimate the seconds to write the answer."""
        return self.numbers * NUMBER_S


class SingleCall(msgspec.Struct, frozen=True):
    """A decoded request for a single: feeds [n, *shape] by input name, and the encoder of its outputs."""

    feeds: dict[str, Array]
    n: int
    encode: Callable[[Mapping[str, Array]], Encoded]

    @property
    def numbers(self) -> int:
        """The number of values in all inputs together."""
        return sum(array.size for array in self.feeds.values())

    @property
    def seconds(self) -> float | None:
        """None: what a graph makes of its inputs is not known before it has run."""
        return None


@lru_cache(maxsize=256)
def negotiate_media(content_type: str, accept: str) -> tuple[str, str]:
    """Return for (Content-Type, Accept) the types of body and answer, each JSON, NPY or LINES.

    A missing content type means JSON; a missing Accept, or one of any type, means the type of the body. Raises
    UnsupportedMedia that names the supported types.
    """
    sent = content_type.partition(";")[0].strip().lower() or JSON
    if sent not in MEDIA:
        served = ", ".join(MEDIA)
        raise UnsupportedMedia(f"content type {sent[:80]!r} is not served; send one of {served}", field="content-type")
    ranked = sorted((_parse_media_range(each) for each in accept.split(",") if each.strip()), key=lambda pair: -pair[1])
    for media, quality in ranked:
        if quality > 0:
            if media in ("*/*", "application/*"):
                return sent, sent
            if media in MEDIA:
                return sent, media
    if ranked:
        raise UnsupportedMedia(f"accept {accept[:80]!r} has nothing we give; ask {' or '.join(MEDIA)}", field="accept")
    return sent, sent


class FamilyCodec:
    """Tensor JSON, npy and, if the archive has a forecast, DeepAR JSON for one forecaster archive."""

    quick_bytes = QUICK_BYTES

    def __init__(
        self,
        tensor: Tensor,
        forecast: ForecastSpec | None = None,
        budget: RequestBudget | None = None,
        calibration: BandCalibration | None = None,
        facts: Mapping[str, object] = MappingProxyType({}),
    ) -> None:
        """`budget` refuses forecasts of too many rows; None means no limit. `calibration` shifts their levels.

        `facts` are further plain values of a whole description.

        Raises model_store.errors.ArchiveInvalid if the recipe of the forecast cannot be run.
        """
        self._name = tensor.input_name
        self._shapes = {tensor.input_name: tensor.input_shape}
        self._output_shape = tensor.output_shape
        #: What reads and writes its forecasts; None where it answers tensors.
        self.forecaster = None if forecast is None else DeepAr(forecast, budget, calibration)
        self._budget, self._facts = budget, facts
        self._signature = open_inference.Signature(self._shapes, {OUTPUT: tensor.output_shape})

    def __repr__(self) -> str:
        return f"<FamilyCodec {self._shapes} -> {self._output_shape}, {self.forecaster or 'tensors only'}>"

    @property
    def adaptable(self) -> DeepAr | None:
        """What adapts its bands to observed prices; None where it answers tensors, or has no band."""
        return self.forecaster if self.forecaster is not None and self.forecaster.is_adaptable else None

    def describe(self, *, whole: bool = False) -> dict[str, object]:
        """Describe what a forecast request must know of the archive, in plain values; empty if it answers tensors.

        `whole`: all of it, else what a list of a thousand models has room for.
        """
        describe = describe_recipe if whole else describe_forecast
        forecast: dict[str, object] = (
            {} if self.forecaster is None else {"forecast": describe(self.forecaster.forecast)}
        )
        return {**forecast, **self._facts} if whole else forecast

    def decode(
        self, body: bytes | memoryview, content_type: str, accept: str, place: Place | None = None
    ) -> DecodedCall:
        """Decode body and headers (empty if absent) of a request into its rows. Raises RequestError.

        With `place` rows are written where it says, once they are right.
        """
        if content_type.startswith(OURS):
            return self._infer(bytes(body), content_type, accept, place)
        sent, wanted = negotiate_media(content_type, accept)
        if LINES in (sent, wanted):
            return self._lines(bytes(body), sent, wanted, place)
        encode = self._encode_npy if wanted == NPY else self._encode_json
        if sent == NPY:
            row = tensors.read_npy(body, self._name, self._shapes[self._name], copy=place is None)
        else:
            body = bytes(body)
            found = tensors.read_json(body, self._shapes)
            if found is None:
                return self._forecast(body, wanted, place)
            row = found[self._name]
        return DecodedCall(put_rows(row[None], place), encode)

    def _infer(self, body: bytes, content_type: str, model: str, place: Place | None) -> DecodedCall:
        """Decode a request of the Open Inference Protocol, for a model that the client calls `model`."""
        if content_type == open_inference.DESCRIBE:
            nothing = np.empty((0, *self._shapes[self._name]), np.float32)
            description = self._describe_tensors()
            return DecodedCall(nothing, lambda _: (description, JSON))
        document = open_inference_requests.InferDocument(body, content_type)
        if self.forecaster is not None and document.is_text_for(DEEPAR_INPUT):
            return self._infer_forecast(document.read(DEEPAR_ROWS), self.forecaster, model, place)
        call = document.read(self._signature)
        if call.n > 1 and self._budget is not None:
            self._budget(call.n)
        rows = put_rows(np.ascontiguousarray(call.feeds[self._name]), place)

        def encode(outputs: Float32) -> Encoded:
            return open_inference.write_answer(call, model, {OUTPUT: check_finite(OUTPUT, outputs)})

        return DecodedCall(rows, encode, call.n * prod(self._output_shape) if call.n > 1 else 0)

    def _infer_forecast(
        self, call: open_inference.Call, deepar: DeepAr, model: str, place: Place | None
    ) -> DecodedCall:
        """Decode the DeepAR JSON that is the one element of an input, which is answered in the same form.

        Raises RequestError.
        """
        if call.n != 1:
            message = f"one element holds a whole request, with any number of instances: send one, not {call.n}"
            raise RequestError(message, field="inputs[0].shape")
        rows, encode = deepar.decode(call.feeds[DEEPAR_INPUT][0, 0].encode())
        rows = put_rows(rows, place)

        def encode_text(outputs: Float32) -> Encoded:
            text = encode(check_finite("predictions", outputs)).decode()
            return open_inference.write_answer(call, model, {DEEPAR_OUTPUT: np.array([[text]], object)})

        return DecodedCall(rows, encode_text, encode.numbers, encode.answered, encode.marks)

    def _describe_tensors(self) -> bytes:
        if self.forecaster is None:
            return open_inference.describe_tensors(self._signature)
        return open_inference.describe_tensors(
            self._signature,
            forecast=describe_recipe(self.forecaster.forecast),
            forecast_input=open_inference.list_tensor(DEEPAR, DEEPAR_INPUT, DEEPAR.inputs[DEEPAR_INPUT]),
            forecast_output=open_inference.list_tensor(DEEPAR, DEEPAR_OUTPUT, DEEPAR.outputs[DEEPAR_OUTPUT]),
        )

    def _forecast(self, body: bytes, wanted: str, place: Place | None) -> DecodedCall:
        if wanted != JSON:
            raise UnsupportedMedia(f"a forecast is answered as {JSON}, not {wanted}", field="accept")
        rows, encode = self._forecaster("instances").decode(body)
        rows = put_rows(rows, place)
        write = lambda outputs: (encode(check_finite("predictions", outputs)), JSON)  # noqa: E731
        return DecodedCall(rows, write, encode.numbers, encode.answered, encode.marks)

    def _lines(self, body: bytes, sent: str, wanted: str, place: Place | None) -> DecodedCall:
        """Decode JSON Lines. Only the answer of a line whose outputs are not finite is an error."""
        if sent != wanted:
            raise UnsupportedMedia(f"{LINES} is answered as {LINES}; not {sent} as {wanted}", field="accept")
        rows, encode = self._forecaster(None).decode_lines(body)
        rows = put_rows(rows, place)
        write = lambda outputs: (encode(np.ascontiguousarray(outputs)), LINES)  # noqa: E731
        return DecodedCall(rows, write, encode.numbers, encode.answered, encode.marks)

    def _forecaster(self, field: str | None) -> DeepAr:
        if self.forecaster is None:
            name, shape = next(iter(self._shapes.items()))
            message = f"the archive has no `forecast` and answers tensors only: send {name!r} {list(shape)}"
            raise RequestError(message, field=field)
        return self.forecaster

    def _encode_json(self, outputs: Float32) -> Encoded:
        return tensors.write_json({"predictions": check_finite("predictions", outputs)[0]}), JSON

    def _encode_npy(self, outputs: Float32) -> Encoded:
        return tensors.write_npy(check_finite("predictions", outputs)[0]), NPY


class SingleCodec:
    """Tensor JSON, and npy for one input or one output, for one single (an ONNX session)."""

    quick_bytes = QUICK_BYTES

    def __init__(
        self, inputs: Mapping[str, Shape], outputs: Mapping[str, Shape], types: Mapping[str, str] | None = None
    ) -> None:
        """`types`: datatypes of the Open Inference Protocol by tensor, of those that are not FP32."""
        self._inputs = dict(inputs)
        self._outputs = tuple(outputs)
        self._signature = open_inference.Signature(self._inputs, outputs, dict(types or {}))
        self._has_types = bool(self._signature.types.keys() & self._inputs.keys())

    def __repr__(self) -> str:
        return f"<SingleCodec {self._inputs} -> {', '.join(self._outputs)}>"

    def decode(self, body: bytes | memoryview, content_type: str, accept: str) -> SingleCall:
        """Decode body and headers (empty if absent) of a request into its feeds. Raises RequestError.

        n is 1, or the rows of a request of the Open Inference Protocol, or 0 where only a description is asked.
        """
        if content_type.startswith(OURS):
            return self._infer(bytes(body), content_type, accept)
        sent, wanted = negotiate_media(content_type, accept)
        if LINES in (sent, wanted):
            raise UnsupportedMedia(f"{LINES} is for forecasts; the model answers tensors only: send {JSON}")
        if sent == NPY:
            self._require_npy("carries", "takes", tuple(self._inputs))
        if wanted == NPY:
            self._require_npy("carries", "gives", self._outputs)
        if sent == NPY:
            ((name, shape),) = self._inputs.items()
            found: dict[str, Array] | None = {name: tensors.read_npy(body, name, shape)}
        elif self._has_types:
            found = self._read_typed(bytes(body))
        else:
            read = tensors.read_json(bytes(body), self._inputs)
            found = None if read is None else {**read}
        if found is None:
            raise RequestError("the model answers tensors only", field="instances")
        feeds = {name: array[None] for name, array in found.items()}
        return SingleCall(feeds, 1, self._encode_npy if wanted == NPY else self._encode_json)

    def _require_npy(self, verb: str, does: str, names: tuple[str, ...]) -> None:
        """Raises UnsupportedMedia unless the tensors are one of float32, which is what npy is read and written as."""
        typed = [name for name in names if name in self._signature.types]
        if len(names) != 1 or typed:
            shown = ", ".join(f"{name} ({self._signature.get_datatype(name).name})" for name in names)
            raise UnsupportedMedia(f"{NPY} {verb} one {FP32} array; the model {does} {shown}: use {JSON}")

    def _read_typed(self, body: bytes) -> dict[str, Array] | None:
        """Read tensor JSON whose inputs have datatypes of their own; None for a forecast."""
        given = tensors.read_document(body, self._inputs)
        if given is None:
            return None
        types = self._signature.get_datatype
        return {name: read_values(given[name], types(name), shape, name) for name, shape in self._inputs.items()}

    def _infer(self, body: bytes, content_type: str, model: str) -> SingleCall:
        """Decode a request of the Open Inference Protocol, for a model that the client calls `model`."""
        if content_type == open_inference.DESCRIBE:
            description = open_inference.describe_tensors(self._signature)
            return SingleCall({}, 0, lambda _: (description, JSON))
        call = open_inference_requests.read_request(body, content_type, self._signature)

        def encode(outputs: Mapping[str, Array]) -> Encoded:
            sound = {asked.name: self._check(asked.name, outputs) for asked in call.outputs}
            return open_inference.write_answer(call, model, sound)

        return SingleCall(dict(call.feeds), call.n, encode)

    def _check(self, name: str, outputs: Mapping[str, Array]) -> Array:
        """An output [n, ...], C-contiguous. Raises RunFailed that names the first number that is not finite."""
        at = find_not_finite(outputs[name], self._signature.get_datatype(name))
        if at is not None:
            place = "".join(f"[{i}]" for i in np.unravel_index(at, outputs[name].shape))
            raise RunFailed(f"the model's output is not finite: {name}{place} is {outputs[name].reshape(-1)[at]}")
        return np.ascontiguousarray(outputs[name])

    def _encode_json(self, outputs: Mapping[str, Array]) -> Encoded:
        rows = {name: self._write(name, self._check(name, outputs)[0]) for name in self._outputs}
        return tensors.write_json({"predictions": rows if len(rows) > 1 else rows[self._outputs[0]]}), JSON

    def _write(self, name: str, array: Array) -> object:
        datatype = self._signature.get_datatype(name)
        return array if datatype.name == FP32 else nest_values(array, datatype)

    def _encode_npy(self, outputs: Mapping[str, Array]) -> Encoded:
        (name,) = self._outputs
        return tensors.write_npy(self._check(name, outputs)[0]), NPY


def describe_forecast(forecast: ForecastSpec) -> dict[str, object]:
    """Describe the clock, the lengths, the covariates' names (the first ones) and the tails of a forecast."""
    levels = forecast.trained_levels
    more = len(forecast.dynamic_feat) - SHOWN_NAMES
    return {
        "frequency": forecast.frequency,
        "time_zone": forecast.time_zone,
        "origin": forecast.origin or "any",
        "history_length": forecast.history_length,
        "prediction_length": forecast.prediction_length,
        "dynamic_feat": [*forecast.dynamic_feat[:SHOWN_NAMES], *([f"and {more} more"] if more > 0 else [])],
        "tail": f"{forecast.tail} beyond {levels[0]:g} and {levels[-1]:g}{_describe_tails(forecast)}",
        **({"residual_to": forecast.residual_to} if forecast.residual_to else {}),
    }


def _describe_tails(forecast: ForecastSpec) -> str:
    """Say how far the tails reach, and what they were learnt from; empty for other rules."""
    tails = forecast.tails
    if not tails:
        return ""
    band = f"the band {tails.band[0]:g} to {tails.band[1]:g}"
    prices = f"from {tails.beyond[0]} and {tails.beyond[1]} past prices"
    return f", by {tails.low:g} and {tails.high:g} widths of {band} in the mean, {prices}"


def describe_recipe(forecast: ForecastSpec) -> dict[str, object]:
    """Describe all that a forecast request must know, for clients: covariates by name and order, levels, products.

    `needs_start`: whether a forecast depends on when it begins. `paths`: sample paths that the network draws itself; 0:
    none, so that samples of its steps are independent.
    """
    return {
        **describe_forecast(forecast),
        "dynamic_feat": list(forecast.dynamic_feat),
        "cat": list(forecast.cat),
        "quantile_levels": list(forecast.quantile_levels),
        "products": list(forecast.products),
        "unit": forecast.unit,
        "needs_start": bool(forecast.origin) or any(channel.source == "calendar" for channel in forecast.inputs),
        "step_s": parse_step_seconds(forecast.frequency),
        "paths": forecast.paths or 0,
    }


def _parse_media_range(text: str) -> tuple[str, float]:
    """Parse one media range of an Accept header into (type in lower case, its q)."""
    media, *parameters = (part.strip().lower() for part in text.split(";"))
    quality = 1.0
    for parameter in parameters:
        if parameter.startswith("q="):
            try:
                quality = float(parameter[2:])
            except ValueError:
                quality = 0.0
    return media, quality

"""What MLflow's clients send to one model, and its answer (CONTRACTS 9). Runs in a front.

What is section 5 as it stands goes to the worker as it came. Frames, tensors with a batch axis and `params` are taken
apart here: fields are cut out without decoding, and only frames are decoded, under the bound of values.
"""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from model_store.names import ModelName
from server.contract import JSON, NPY
from server.errors import Refused, Situation
from server.front.exchange import HttpReply, HttpRequest, Limit
from server.front.forecasting.bodies import decode_body, require_few
from server.front.forecasting.calls import Asked, Forecast, ForecastCall, require_forecasts
from server.front.forecasting.frames import (
    Frame,
    SeriesAsked,
    gather_records,
    is_wide,
    list_series,
    make_frame,
    read_csv,
    write_records,
)
from server.front.forecasting.misspelt_keys import refuse_misspelt
from server.front.forecasting.parquet import MEDIA as PARQUET
from server.front.forecasting.parquet import read_parquet
from server.front.forecasting.recipes import check_horizon
from server.front.inference import InferRequest, InferStats
from server.front.inference_plane import InferencePlane, add_near_names
from server.front.json_cutter import NotJson, cut_fields, cut_items
from server.front.slices import Pacer

FORMS = ("instances", "inputs", "dataframe_split", "dataframe_records")
CSV, LINES = "text/csv", "application/jsonlines"
MAX_ROWS, AT_ONCE = 1024, 64  #: tensors of one call, and of these so many at the workers at once
OK = 200


class _Split(msgspec.Struct):
    data: list[list[Any]]
    columns: list[str] | None = None
    index: msgspec.Raw = msgspec.Raw(b"null")


class _Params(msgspec.Struct):
    h: int | None = None


_split, _object = msgspec.json.Decoder(_Split), msgspec.json.Decoder(dict[str, Any])
_params: "msgspec.json.Decoder[_Params]" = msgspec.json.Decoder(_Params)
_records: "msgspec.json.Decoder[Sequence[Mapping[str, Any]]]" = msgspec.json.Decoder(list[dict[str, Any]])


class Scoring:
    """One call to one model."""

    def __init__(self, plane: InferencePlane, request: HttpRequest, model: ModelName, limit: Limit) -> None:
        self._plane, self._request, self._model, self._limit = plane, request, model, limit
        self._call, self._pacer = ForecastCall(plane, request, limit), Pacer()

    def __repr__(self) -> str:
        """For example `<Scoring of au/NSW1.mar>`."""
        return f"<Scoring of {self._model}>"

    async def answer(self) -> HttpReply:
        """The model's answer. Raises Refused, ClientGone."""
        media = self._read_media()
        if media == CSV:
            return await self._forecast_frame(read_csv(self._request.body), {}, None)
        if media == PARQUET:
            return await self._forecast_frame(await read_parquet(self._request.body, self._request.deadline), {}, None)
        if media in (NPY, LINES):
            return await self._pass_on(self._request.body)
        try:
            fields = await self._pacer.run(cut_fields(self._request.body))
        except NotJson as error:
            raise Refused(Situation.BAD_REQUEST, f"the body is no JSON object: {error}") from None
        given = [name for name in FORMS if name in fields]
        if len(given) > 1:
            message = f"a request has one of {', '.join(FORMS)}, not {' and '.join(given)}"
            raise Refused(Situation.BAD_REQUEST, message)
        if not given or (given == ["instances"] and "params" not in fields):
            return await self._pass_on(self._request.body)
        return await self._answer_form(given[0], fields)

    def _read_media(self) -> str:
        """The media type; JSON where none is said. Raises Refused for one that is not served."""
        media, *parameters = (part.strip().lower() for part in self._request.content_type.split(";"))
        if any(each not in ("charset=utf-8", 'charset="utf-8"') for each in parameters if each):
            message = f"{self._request.content_type[:80]!r}: only charset=utf-8 may follow a content type"
            raise Refused(Situation.UNSUPPORTED_CODING, message, field="content-type")
        if media not in ("", JSON, CSV, PARQUET, NPY, LINES):
            message = f"content type {media[:80]!r} is not served; send {JSON} or {CSV}"
            raise Refused(Situation.UNSUPPORTED_CODING, message, field="content-type")
        return media

    async def _answer_form(self, form: str, fields: Mapping[str, msgspec.Raw]) -> HttpReply:
        refuse_misspelt(fields, (*FORMS, "params", "configuration"))
        raw = bytes(fields[form])
        configuration, h = self._read_params(fields)
        if form == "dataframe_split":
            split = decode_body(_split, raw)
            columns = split.columns or [str(i) for i in range(len(split.data[0]) if split.data else 0)]
            return await self._forecast_frame(make_frame(columns, split.data, "the row"), configuration, h)
        if form == "dataframe_records":
            return await self._forecast_frame(gather_records(decode_body(_records, raw)), configuration, h)
        if form == "inputs" and not _holds_objects(raw):
            return await self._infer_tensors(raw)
        if h is None:
            wanted = msgspec.json.encode(configuration)
            return await self._pass_on(b'{"instances":%b,"configuration":%b}' % (raw, wanted))
        instances = decode_body(_records, raw)
        return await self._forecast([SeriesAsked(dict(each)) for each in instances], configuration, h, long=False)

    def _read_params(self, fields: Mapping[str, msgspec.Raw]) -> tuple[dict[str, Any], int | None]:
        """The configuration, of `params` or else its own, and `h`. The model refuses keys that it does not know."""
        name = "params" if "params" in fields else "configuration"
        raw = fields.get(name)
        if raw is None or bytes(raw).strip() == b"null":
            return {}, None
        found = decode_body(_object, bytes(raw))
        h = decode_body(_params, bytes(raw)).h if name == "params" else None
        if name == "params":
            found.pop("h", None)
        return found, h

    async def _pass_on(self, body: bytes) -> HttpReply:
        """The worker's answer to a body of section 5, as it is."""
        request = self._request
        content_type = request.content_type if body is request.body else JSON
        try:
            response = await self._plane.infer(self._make_request(body, content_type or JSON, request.accept))
        except Refused as why:
            add_near_names(why, self._model, self._plane)
            raise
        return HttpReply(OK, response.content_type, response.body, [], response.stats, response)

    def _make_request(self, body: bytes, content_type: str, accept: str) -> InferRequest:
        asked = self._request
        origin = (asked.arrived, asked.id, asked.client)
        accept = "" if accept == "*/*" else accept
        return InferRequest(self._model, body, content_type, accept, asked.deadline, asked.client_gone, *origin)

    async def _forecast_frame(self, frame: Frame, configuration: dict[str, Any], h: int | None) -> HttpReply:
        series = list_series(frame, await self._call.describe(self._model))
        if not series:
            raise Refused(Situation.BAD_REQUEST, "the frame has no rows", field="data")
        return await self._forecast(series, configuration, h, long=not is_wide(frame))

    async def _forecast(
        self, series: list[SeriesAsked], configuration: dict[str, Any], h: int | None, *, long: bool
    ) -> HttpReply:
        """Forecasts of all series: records of steps for a long frame, else predictions, cut to `h` steps."""
        recipe = await self._call.describe(self._model)
        horizon = recipe.prediction_length if h is None else h
        check_horizon(recipe, horizon, "params.h")
        levels = configuration.get("quantiles")
        asked = len(levels) if isinstance(levels, list) else len(recipe.quantile_levels)
        require_few(len(series) * horizon * len(recipe.products) * (asked + 3), "the answer")
        if long and len(recipe.products) > 1:
            message = f"a long frame has one product, the model has {len(recipe.products)}: send instances"
            raise Refused(Situation.BAD_REQUEST, message, field="target")
        found = await self._call.forecast([Asked(self._model, each.instance) for each in series], configuration)
        forecasts = require_forecasts(found)
        predictions: list[Any] = []
        for one, forecast in zip(series, forecasts, strict=True):
            if long:
                predictions += write_records(one, forecast, recipe, horizon)
            else:
                predictions.append(_cut(forecast, horizon, several=len(recipe.products) > 1))
        return HttpReply(OK, JSON, msgspec.json.encode({"predictions": predictions}))

    async def _infer_tensors(self, raw: bytes) -> HttpReply:
        """Tensors with a batch axis: each row is a request of its own, which workers batch."""
        bodies = await self._cut_rows(raw)
        answers = list[Any]()
        for at in range(0, len(bodies), AT_ONCE):
            asked = (self._infer_row(body) for body in bodies[at : at + AT_ONCE])
            answers += await asyncio.gather(*asked)
        first: InferStats | None = answers[0][1] if answers else None
        joined = b",".join(bytes(raw) for raw, _ in answers)
        return HttpReply(OK, JSON, b'{"predictions":[' + joined + b"]}", [], first)

    async def _cut_rows(self, raw: bytes) -> list[bytes]:
        """A body for each row. Raises Refused."""
        try:
            if raw.lstrip()[:1] == b"{":
                columns = await self._pacer.run(cut_fields(raw))
            else:
                columns = {await self._find_input(): msgspec.Raw(raw)}
            cut = {name: await self._pacer.run(cut_items(value, MAX_ROWS)) for name, value in columns.items()}
        except NotJson as error:
            message = f"tensors are lists with an axis of rows, by the names of inputs where there are several: {error}"
            raise Refused(Situation.BAD_REQUEST, message, field="inputs") from None
        lengths = {len(rows) for rows in cut.values()}
        if len(lengths) != 1 or not 1 <= max(lengths) <= MAX_ROWS:
            message = f"inputs have 1 to {MAX_ROWS} rows, all of them the same number"
            raise Refused(Situation.BAD_REQUEST, message, field="inputs")
        names = [msgspec.json.encode(name) for name in cut]
        pairs = (zip(names, row, strict=True) for row in zip(*cut.values(), strict=True))
        return [b"{" + b",".join(b"%b:%b" % (name, bytes(value)) for name, value in row) + b"}" for row in pairs]

    async def _find_input(self) -> str:
        """The name of the model's only input. Raises Refused where it has several."""
        inputs = await self._call.list_inputs(self._model)
        if len(inputs) != 1:
            message = f"the model takes {', '.join(inputs[:10])}: send an object of these names"
            raise Refused(Situation.BAD_REQUEST, message, field="inputs")
        return inputs[0]

    async def _infer_row(self, body: bytes) -> tuple[msgspec.Raw, InferStats]:
        response = await self._plane.infer(self._make_request(body, JSON, JSON))
        fields = await self._pacer.run(cut_fields(await response.read()))
        return fields["predictions"], response.stats


def _holds_objects(raw: bytes) -> bool:
    """Whether JSON is a list whose first item is an object."""
    start = raw[:1024].lstrip()
    return start[:1] == b"[" and start[1:].lstrip()[:1] == b"{"


def _cut(forecast: Forecast, horizon: int, *, several: bool) -> dict[str, Any]:
    """A prediction of section 5 with its first steps alone."""

    def cut(numbers: list[Any]) -> list[Any]:
        return [each[:horizon] for each in numbers] if several else numbers[:horizon]

    prediction: dict[str, Any] = {} if forecast.start is None else {"start": forecast.start}
    if forecast.mean is not None:
        prediction["mean"] = cut(forecast.mean)
    if forecast.quantiles:
        prediction["quantiles"] = {level: cut(numbers) for level, numbers in forecast.quantiles.items()}
    if forecast.samples is not None:
        prediction["samples"] = [cut(sample) for sample in forecast.samples]
    return prediction

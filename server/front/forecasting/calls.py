"""Forecasts for dialects that decode numbers: a model is asked what it is, then many instances. Runs in a front."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import msgspec

from model_store.names import InvalidModelName, ModelName, parse_model_name
from server.contract import JSON, OPEN_INFERENCE_DESCRIBE
from server.errors import Refused, Situation
from server.front.call_items import Item
from server.front.exchange import HttpRequest, Limit
from server.front.fan_out import FanOut, Joint, MultiModelCall, Prediction, put_samples
from server.front.forecasting.recipes import (
    Recipe,
    find_series,
    read_inputs,
    read_products,
    read_recipe,
    split_member,
    unite_recipes,
)
from server.front.inference import InferRequest, InferStats
from server.front.inference_plane import InferencePlane, add_near_names
from server.front.marks import add_marks
from server.front.slices import ITEM, Pacer, join_parts

AT_ONCE = 64  #: models that are asked at once what they are
MOST_FORECASTERS = 10_000  #: names that a front remembers

Numbers = list[Any]  #: [T] of one product, [D][T] of several


class Forecast(msgspec.Struct):
    """One prediction of section 5, decoded. Each is [T] of one product, [D][T] of several."""

    mean: Numbers | None = None
    quantiles: dict[str, Numbers] = {}
    samples: Numbers | None = None
    start: str | None = None


@dataclass(frozen=True, slots=True)
class Asked:
    """One instance for one model."""

    model: ModelName
    instance: Mapping[str, Any]


_decode = msgspec.json.Decoder(Forecast).decode


@dataclass(frozen=True, slots=True)
class Taker:
    """A model of a correlation archive, and the numbers of the call's series that it takes, a product each."""

    model: ModelName
    series: Sequence[int]


@dataclass(frozen=True, slots=True)
class Described:
    """What a client's model stands for. `takers`: of a correlation archive; None: the model takes all series."""

    model: ModelName
    recipe: Recipe
    takers: Sequence[Taker] | None


class ForecastCall:
    """The forecasts of one HTTP request. `limit` bounds what they hold together."""

    def __init__(self, plane: InferencePlane, request: HttpRequest, limit: Limit) -> None:
        self._plane, self._request, self._limit = plane, request, limit

    def __repr__(self) -> str:
        """For example `<ForecastCall /v2/forecast>`."""
        return f"<ForecastCall {self._request.path[:80]}>"

    async def describe(self, model: ModelName) -> Recipe:
        """What the model's forecast requests must be; it is loaded for that. Raises Refused, ClientGone."""
        return self._read(await self._ask_description(model), model)

    async def is_forecaster(self, model: ModelName) -> bool:
        """Whether the model takes instances and lines of section 5. Raises Refused, ClientGone."""
        description = await self._ask_description(model)
        try:
            self._read(description, model)
        except Refused:  # it answers tensors, or is code, which describes itself as it likes
            return False
        return True

    async def describe_each(self, model: ModelName, series: int | None = None) -> Described:
        """Who takes a call's series, and what these must be.

        That is the model itself or, for a correlation archive, the models that it names: each takes the series of its
        products, which are in the order of the archive's members. Raises Refused, also where `series` is another
        number, and ClientGone.
        """
        description = await self._ask_description(model)
        members = read_products(description)
        if members is None:
            return Described(model, self._read(description, model), None)
        if series not in (None, len(members)):
            message = f"{model} takes {len(members)} series, of {', '.join(members[:10])} in this order, not {series}"
            raise Refused(Situation.BAD_REQUEST, message, field="series.sizes")
        recipes = dict[str, Recipe]()
        asked = [parse_model(split_member(member)[0], "model") for member in members]
        for name, found in (await self.describe_all(asked)).items():
            if isinstance(found, Refused):
                raise found
            recipes[name] = found
        takers = [Taker(name, find_series(name, recipes[name], members)) for name in dict.fromkeys(asked)]
        return Described(model, unite_recipes(recipes), takers)

    def _note_marks(self, predictions: Sequence[Prediction | Refused]) -> None:
        """Note what the answers are to be doubted for, for the headers of the reply."""
        marked = [each.stats for each in predictions if isinstance(each, Prediction)]
        if self._request.stats is not None:
            marked.append(self._request.stats)
        quality, warnings = add_marks(each.quality for each in marked), add_marks(each.warnings for each in marked)
        if quality or warnings:
            self._request.stats = InferStats(None, 0, None, 0, quality=quality, warnings=warnings)

    def _read(self, description: bytes, model: ModelName) -> Recipe:
        recipe = read_recipe(description, model)
        if len(self._plane.forecasters) < MOST_FORECASTERS:
            self._plane.forecasters[model] = None
        return recipe

    async def describe_all(self, models: Sequence[ModelName]) -> dict[ModelName, Recipe | Refused]:
        """What each model's forecast requests must be, or why it does not say so. Raises ClientGone."""
        different = list(dict.fromkeys(models))
        found: dict[ModelName, Recipe | Refused] = {}
        for at in range(0, len(different), AT_ONCE):
            some = different[at : at + AT_ONCE]
            found.update(zip(some, await asyncio.gather(*map(self._try_describe, some)), strict=True))
        return found

    async def _try_describe(self, model: ModelName) -> Recipe | Refused:
        try:
            return await self.describe(model)
        except Refused as why:
            return why

    async def list_inputs(self, model: ModelName) -> list[str]:
        """The names of the model's tensors. Raises Refused, ClientGone."""
        return read_inputs(await self._ask_description(model), model)

    async def _ask_description(self, model: ModelName) -> bytes:
        asked = self._request
        origin = (asked.arrived, asked.id, asked.client)
        request = InferRequest(model, b"", OPEN_INFERENCE_DESCRIBE, model, asked.deadline, asked.client_gone, *origin)
        try:
            response = await self._plane.infer(request)
        except Refused as why:
            add_near_names(why, model, self._plane)
            raise
        return await response.read()

    async def forecast(
        self, asked: Sequence[Asked], configuration: Mapping[str, Any], joint: Joint | None = None
    ) -> list[Forecast | Refused]:
        """What came of each instance, in order. Raises Refused for a call that fails as a whole, ClientGone.

        With `joint` sample s is the same scenario in all of them.
        """
        pacer, items = Pacer(), list[Item | Refused]()
        for each in asked:
            instance = msgspec.json.encode(each.instance)
            items.append(Item(each.model, msgspec.Raw(instance)))
            await pacer.spend(ITEM + len(instance))
        call = MultiModelCall(items, msgspec.json.encode(configuration), joint, len(self._request.body))
        request = self._request
        origin = (request.arrived, request.id, request.client)
        found: list[Forecast | Refused] = []
        with FanOut(self._plane, call, self._limit, request.deadline, request.client_gone, *origin) as fan_out:
            predictions = await fan_out.infer()
            self._note_marks(predictions)
            if joint is not None and any(isinstance(each, Prediction) for each in predictions):
                scenarios = await fan_out.draw(joint, predictions, JSON)
                predictions = [
                    each
                    if isinstance(each, Refused)
                    else Prediction(await pacer.run(join_parts(each.parts)), each.stats)
                    for each in await pacer.run(put_samples(predictions, scenarios))
                ]
            for prediction in predictions:
                found.append(_read(prediction))
                await pacer.spend(
                    ITEM if isinstance(prediction, Refused) else ITEM + len(cast("bytes", prediction.body))
                )
        return found


def require_forecasts(found: Sequence[Forecast | Refused]) -> list[Forecast]:
    """All forecasts. Raises the first refusal, with its place among the instances, where there is one."""
    forecasts: list[Forecast] = []
    for i, each in enumerate(found):
        if isinstance(each, Refused):
            field = (each.detail.field or "").removeprefix("instances[0].") or None
            raise Refused(each.situation, each.detail.message, i, field, each.detail.retry_ms, each.detail.status)
        forecasts.append(each)
    return forecasts


def list_known(plane: InferencePlane) -> list[str]:
    """The forecasters that this front has asked so far, by name, as far as the client may ask them."""
    return sorted(model for model in plane.forecasters if plane.permits(model))


def parse_model(name: str, field: str) -> ModelName:
    """The name of a model. Raises Refused."""
    try:
        return parse_model_name(name)
    except InvalidModelName as error:
        raise Refused(Situation.BAD_NAME, str(error), field=field) from None


def _read(prediction: Prediction | Refused) -> Forecast | Refused:
    if isinstance(prediction, Refused):
        return prediction
    try:
        return _decode(cast("bytes", prediction.body))
    except msgspec.MsgspecError:
        return Refused(Situation.MODEL_FAILED, "the model answers something else than a forecast")

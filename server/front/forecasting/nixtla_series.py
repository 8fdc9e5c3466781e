"""Series as Nixtla's client sends them, end to end, and the DeepAR instances that they become (CONTRACTS 10). Pure."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from model_store.names import ModelName
from server.errors import Refused, Situation
from server.front.forecasting.bodies import require_few
from server.front.forecasting.calls import Asked, Described, Forecast, Numbers
from server.front.forecasting.recipes import NO_CLOCK, Recipe, check_horizon, level_quantiles, shift_start
from server.front.raw_json import MAX_ITEMS

MARGIN = 4  #: steps kept before a model's history: where a clock repeats an hour, two steps are one of the model's
OLD_CLIENT = (
    "the model needs the time of the series, which clients before nixtla 0.9 do not send: upgrade, or pass "
    "model_parameters={'start': '2026-01-01 00:00:00'}, a list of one for each series where they differ"
)
SIMULATE = (
    "the model forecasts by the clock, and nixtla's simulate sends no times: send "
    "series.start_datetime, as forecast does, or ask a model without calendar"
)
_FRACTION = re.compile(r"\.\d+")  # of a second
Level = int | float
Size = Annotated[int, Meta(ge=1)]
Values = list[float | None]


class Series(msgspec.Struct):
    """`y` is all series end to end, `sizes` are their lengths; `X` [features][all steps], and what follows them."""

    y: Values
    sizes: Annotated[list[Size], Meta(min_length=1, max_length=10_000)]
    X: list[Values] | None = None
    X_future: list[Values] | None = None
    start_datetime: list[str] | None = None


class Parameters(msgspec.Struct, forbid_unknown_fields=True):
    """What `model_parameters` may say: what the client has no arguments for. Lists have an entry for each series."""

    dynamic_feat: list[str] | None = None
    start: str | list[str] | None = None
    item_id: list[str | int] | None = None
    cat: list[list[int]] | None = None
    seed: int | None = None


class NixtlaRequest(msgspec.Struct):
    """A request of any kind; each kind's own fields have defaults. Unknown fields are ignored."""

    series: Series
    model: str
    freq: str
    h: int = 0
    level: Level | Annotated[list[Level], Meta(max_length=100)] | None = None
    finetune_steps: int = 0
    finetuned_model_id: str | None = None
    feature_contributions: bool = False
    multivariate: bool = False
    model_parameters: Parameters | None = None
    n_windows: Annotated[int, Meta(ge=1, le=10_000)] = 1
    step_size: Annotated[int, Meta(ge=1)] | None = None
    hist_exog: list[int | str] | None = None
    detection_size: Annotated[int, Meta(ge=1)] = 1
    threshold_method: str = "univariate"
    n_paths: Annotated[int, Meta(ge=1, le=10_000)] = 100
    seed: int | None = None

    @property
    def levels(self) -> list[Level]:
        """The levels of the intervals, as they were sent; one may be there twice."""
        if self.level is None:
            return []
        return self.level if isinstance(self.level, list) else [self.level]


@dataclass(frozen=True, slots=True)
class Part:
    """The series of one instance: one, or one for each product of the model. `offsets` are theirs in `y`."""

    model: ModelName
    series: Sequence[int]  #: their numbers in the call
    offsets: Sequence[int]
    size: int
    cuts: Sequence[int]  #: how many steps each of its windows knows

    @property
    def index(self) -> int:
        """The number of the series whose covariates and time are the instance's, and that a message names."""
        return self.series[0]


class Plan:
    """The instances of a call, and how their answers lie end to end. Raises Refused that names series and field."""

    def __init__(
        self, request: NixtlaRequest, described: Described, horizon: int, *, backtest: bool, no_time: str = OLD_CLIENT
    ) -> None:
        """`horizon`: the steps of each window. `backtest`: whether windows lie within the series, as do covariates.

        `no_time`: what is said where a series has no time and its model needs one.
        """
        self._no_time = no_time
        recipe = described.recipe
        self._request, self._recipe, self.horizon, self._backtest = request, recipe, horizon, backtest
        self._model, self._takers = described.model, described.takers
        self._parameters = request.model_parameters or Parameters()
        self.parts: list[Part] = []
        self._order: Sequence[int] = ()
        check_horizon(recipe, horizon, "h")
        self._check_series()

    def __repr__(self) -> str:
        """For example `<Plan of 2 parts, 24 steps each>`."""
        return f"<Plan of {len(self.parts)} parts, {self.horizon} steps each>"

    def cut(self, list_cuts: Callable[[int], Sequence[int]]) -> None:
        """Decide the windows: `list_cuts` gives those of a series by its size. Raises Refused for too many numbers."""
        for part in self._group_series():
            try:
                cuts = list_cuts(part.size)
            except ValueError as error:
                raise Refused(Situation.BAD_REQUEST, str(error), part.index, "series.sizes") from None
            self.parts.append(Part(part.model, part.series, part.offsets, part.size, cuts))
        count = sum(len(part.cuts) for part in self.parts)
        if count > MAX_ITEMS:
            message = f"the call has {count} windows, {MAX_ITEMS} are the most"
            raise Refused(Situation.TOO_LARGE, message, field="n_windows")
        keep = self._recipe.history_length + MARGIN
        rows = [(len(part.series) + len(self._order), part.cuts) for part in self.parts]
        require_few(sum(count * min(cut, keep) for count, cuts in rows for cut in cuts), "what the models are sent")
        each = self.horizon * (1 + 2 * len(self._request.levels))
        require_few(sum(each * len(part.series) * len(part.cuts) for part in self.parts), "the answer")

    def list_instances(self) -> Iterator[Asked]:
        """Yield the instances, part by part and window by window."""
        for part in self.parts:
            for cut in part.cuts:
                yield Asked(part.model, self._build_instance(part, cut))

    def lay_out(self, forecasts: Sequence[Forecast], choose: Callable[[Forecast], Numbers | None]) -> list[float]:
        """Numbers of the forecasts end to end: series by series, of each its windows in order."""
        laid = list[float]()
        for part, product, first in self._list_series():
            for each in forecasts[first : first + len(part.cuts)]:
                numbers = _require(choose(each))
                laid += (numbers[product] if len(part.series) > 1 else numbers)[: self.horizon]
        return laid

    def list_places(self) -> list[int]:
        """The index in the common `y` of each number that `lay_out` gives."""
        return [
            part.offsets[product] + cut + step
            for part, product, _ in self._list_series()
            for cut in part.cuts
            for step in range(self.horizon)
        ]

    def list_sizes(self) -> list[int]:
        """How many of those numbers each series has."""
        return [len(part.cuts) * self.horizon for part, _, _ in self._list_series()]

    def _list_series(self) -> list[tuple[Part, int, int]]:
        """For each series of the call, in order, its part, its place there, and where the part's forecasts begin."""
        found, first = list[tuple[int, Part, int, int]](), 0
        for part in self.parts:
            found += [(number, part, product, first) for product, number in enumerate(part.series)]
            first += len(part.cuts)
        return [each[1:] for each in sorted(found, key=lambda each: each[0])]

    def build_configuration(self) -> dict[str, Any]:
        """What is asked of each instance: the mean, and the ends of the intervals."""
        ends = dict.fromkeys(end for level in self._request.levels for end in level_quantiles(level))
        wanted: dict[str, Any] = {"output_types": ["mean", "quantiles"] if ends else ["mean"]}
        if ends:
            wanted["quantiles"] = list(ends)
        if self._parameters.seed is not None:
            wanted["seed"] = self._parameters.seed
        return wanted

    def _check_series(self) -> None:
        series, recipe = self._request.series, self._recipe
        if sum(series.sizes) != len(series.y):
            message = f"the sizes are {sum(series.sizes)} together, but y has {len(series.y)} values"
            raise Refused(Situation.BAD_REQUEST, message, field="series.sizes")
        for level in self._request.levels:
            if not 0 <= level < 100:  # noqa: PLR2004 - percent
                message = f"a level is at least 0 and below 100 percent, not {level}"
                raise Refused(Situation.BAD_REQUEST, message, field="level")
        if self._request.hist_exog:
            raise _refuse_historic(recipe)
        rows = len(series.X or ())
        if not self._backtest and len(series.X_future or ()) != rows:
            raise _refuse_historic(recipe)
        if rows != len(recipe.dynamic_feat):
            names = ", ".join(recipe.dynamic_feat[:10]) or "none"
            message = f"there are {rows} exogenous columns, but the model's are {names}: send these, in this order"
            raise Refused(Situation.BAD_REQUEST, message, field="series.X")
        self._order = self._find_order(rows)
        self._check_lengths()

    def _check_lengths(self) -> None:
        """Every row of covariates is as long as the series; every list of the parameters has an entry for each."""
        series, parameters = self._request.series, self._parameters
        for i, row in enumerate(series.X or ()):
            if len(row) != len(series.y):
                message = f"the row has {len(row)} values, y has {len(series.y)}"
                raise Refused(Situation.BAD_REQUEST, message, field=f"series.X[{i}]")
        for i, row in enumerate(series.X_future or ()):
            wanted = len(series.sizes) * self.horizon
            if len(row) != wanted:
                message = (
                    f"the row has {len(row)} values, {len(series.sizes)} series of {self.horizon} steps have {wanted}"
                )
                raise Refused(Situation.BAD_REQUEST, message, field=f"series.X_future[{i}]")
        start = parameters.start if isinstance(parameters.start, list) else None
        lists: Mapping[str, Sequence[object] | None] = {
            "series.start_datetime": series.start_datetime,
            "model_parameters.start": start,
            "model_parameters.item_id": parameters.item_id,
            "model_parameters.cat": parameters.cat,
        }
        for field, values in lists.items():
            if values is not None and len(values) != len(series.sizes):
                message = f"it has {len(values)} entries for {len(series.sizes)} series"
                raise Refused(Situation.BAD_REQUEST, message, field=field)

    def _find_order(self, rows: int) -> Sequence[int]:
        """For each covariate of the archive the row of `X` that it is."""
        names = self._parameters.dynamic_feat
        if names is None:
            return range(rows)
        if sorted(names) != sorted(self._recipe.dynamic_feat):
            message = f"the names are not the model's: {', '.join(self._recipe.dynamic_feat[:10]) or 'it has none'}"
            raise Refused(Situation.BAD_REQUEST, message, field="model_parameters.dynamic_feat")
        return [names.index(name) for name in self._recipe.dynamic_feat]

    def _group_series(self) -> Iterator[Part]:
        """Yield the series of each instance: one, or as many as the model has products. Raises Refused."""
        sizes = self._request.series.sizes
        offsets = [0, *accumulate(sizes)]
        for model, series in self._assign_series():
            if len({sizes[number] for number in series}) > 1:
                message = f"{model} forecasts {len(series)} series of one length together"
                raise Refused(Situation.BAD_REQUEST, message, field="series.sizes")
            yield Part(model, series, [offsets[number] for number in series], sizes[series[0]], ())

    def _assign_series(self) -> Iterator[tuple[ModelName, Sequence[int]]]:
        """Yield models with the numbers of the series that one instance of theirs has. Raises Refused."""
        count, products = len(self._request.series.sizes), len(self._recipe.products)
        if self._takers is not None:
            yield from ((taker.model, taker.series) for taker in self._takers)
            return
        if products > 1 and not self._request.multivariate:
            message = f"the model forecasts {products} series together: pass multivariate=True"
            raise Refused(Situation.BAD_REQUEST, message, field="multivariate")
        if count % products:
            names = ", ".join(self._recipe.products[:10])
            message = f"the model forecasts {products} series of one length together ({names})"
            raise Refused(Situation.BAD_REQUEST, message, field="series.sizes")
        yield from ((self._model, range(at, at + products)) for at in range(0, count, products))

    def _build_instance(self, part: Part, cut: int) -> dict[str, Any]:
        """The instance of one window, without the steps that the model does not look at."""
        series, parameters, i = self._request.series, self._parameters, part.index
        start, drop = self._find_start(i), max(0, cut - self._recipe.history_length - MARGIN)
        shifted = shift_start(start, drop, self._recipe.frequency) if drop else start
        if shifted is None:
            shifted, drop = start, 0
        rows = [series.y[offset + drop : offset + cut] for offset in part.offsets]
        instance: dict[str, Any] = {"start": shifted, "target": rows if len(rows) > 1 else rows[0]}
        if self._order:
            first = part.offsets[0]
            known, future = series.X or [], series.X_future
            if self._backtest or future is None:
                features = [known[f][first + drop : first + cut + self.horizon] for f in self._order]
            else:
                after = slice(i * self.horizon, (i + 1) * self.horizon)
                features = [known[f][first + drop : first + cut] + future[f][after] for f in self._order]
            instance["dynamic_feat"] = features
        if parameters.item_id is not None:
            instance["item_id"] = parameters.item_id[i]
        if parameters.cat is not None:
            instance["cat"] = parameters.cat[i]
        return instance

    def _find_start(self, i: int) -> str:
        """When a series begins. Raises Refused where that is not said and the model needs it."""
        given, sent = self._parameters.start, self._request.series.start_datetime
        if given is not None:
            return given if isinstance(given, str) else given[i]
        if sent is not None:
            return _FRACTION.sub("", sent[i])
        if self._recipe.needs_start:
            raise Refused(Situation.BAD_REQUEST, self._no_time, i, "series.start_datetime")
        return NO_CLOCK


def _refuse_historic(recipe: Recipe) -> Refused:
    names = ", ".join(recipe.dynamic_feat[:10]) or "none"
    message = (
        f"exogenous columns that are not known for the forecast's steps are not used; the model's columns are {names}"
    )
    return Refused(Situation.BAD_REQUEST, f"{message}: send them in X_df for all steps of h", field="series.X")


def _require(numbers: Numbers | None) -> Numbers:
    if numbers is None:
        raise Refused(Situation.MODEL_FAILED, "the model's answer lacks numbers that were asked")
    return numbers

"""What a model says that its forecast requests must be, and the rules that follow from it (CONTRACTS 8 to 10). Pure."""

import re
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from decimal import Decimal

import msgspec

from server.errors import Refused, Situation

NO_CLOCK = "1970-01-01 00:00:00"  #: where a series begins of which it makes no difference
_ALIAS = re.compile(r"(\d{0,6})([A-Za-z]+)(?:-[A-Z]{3})?")
#: By the aliases of pandas, old and new, and KServe's words: months and longer are no seconds.
_SECONDS = {"s": 1, "min": 60, "h": 3600, "d": 86_400, "w": 604_800}
_UNITS = {
    "sec": "s",
    "second": "s",
    "t": "min",
    "minute": "min",
    "hour": "h",
    "day": "d",
    "week": "w",
    "ms": "month",
    "me": "month",
    "quarter": "q",
    "qs": "q",
    "qe": "q",
    "year": "y",
    "a": "y",
    "ys": "y",
    "ye": "y",
}


class Recipe(msgspec.Struct, frozen=True):
    """What a worker says of a forecaster: see `handlers.codecs.codec.describe_recipe`."""

    frequency: str
    time_zone: str
    history_length: int
    prediction_length: int
    dynamic_feat: list[str]
    quantile_levels: list[float]
    products: list[str]
    cat: list[str] = []
    needs_start: bool = True
    paths: int = 0


class _Correlation(msgspec.Struct):
    products: list[str]


class _Parameters(msgspec.Struct):
    forecast: Recipe | None = None
    correlation: _Correlation | None = None


class _Input(msgspec.Struct):
    name: str


class _Inputs(msgspec.Struct):
    inputs: list[_Input]


class _Description(msgspec.Struct):
    parameters: _Parameters = msgspec.field(default_factory=_Parameters)


_decode = msgspec.json.Decoder(_Description).decode


def read_recipe(description: bytes, model: str) -> Recipe:
    """The recipe in a worker's description of a model. Raises Refused for a model that answers tensors only."""
    try:
        recipe = _decode(description).parameters.forecast
    except msgspec.ValidationError:  # an archive of code describes itself as it likes
        recipe = None
    if recipe is None:
        raise Refused(Situation.BAD_REQUEST, f"the model {model} answers tensors only, no forecasts", field="model")
    return recipe


def read_products(description: bytes) -> list[str] | None:
    """The names that a correlation archive ties together, in its order; None for any other model."""
    try:
        correlation = _decode(description).parameters.correlation
    except msgspec.ValidationError:
        return None
    return None if correlation is None else correlation.products


def split_member(member: str) -> tuple[str, str]:
    """The model and the product of a correlation's member: `MODEL#PRODUCT`, or a model of one product."""
    model, mark, product = member.rpartition("#")
    return (model, product) if mark else (member, "")


def find_series(model: str, recipe: Recipe, members: Sequence[str]) -> list[int]:
    """The places of a model's products among the members, in the model's order. Raises Refused where one is missing."""
    wanted = [f"{model}#{product}" for product in recipe.products] if len(recipe.products) > 1 else [model]
    mine = [member for member in members if split_member(member)[0] == model]
    if sorted(mine) != sorted(wanted):
        message = (
            f"the correlation ties {', '.join(mine[:10])}, but {model} forecasts {', '.join(wanted[:10])} together"
        )
        raise Refused(Situation.BAD_REQUEST, f"{message}: fit it again with these names", field="model")
    return [members.index(name) for name in wanted]


def unite_recipes(recipes: Mapping[str, Recipe]) -> Recipe:
    """What series must be that go to one of these models each: the most history, the fewest steps. Raises Refused.

    Their steps and covariates must be the same.
    """
    first_name, first = next(iter(recipes.items()))
    for name, recipe in recipes.items():
        why = ""
        if normalize_frequency(recipe.frequency) != normalize_frequency(first.frequency):
            why = f"{name} forecasts in steps of {recipe.frequency}, {first_name} in steps of {first.frequency}"
        elif recipe.dynamic_feat != first.dynamic_feat:
            why = f"{name} has other covariates than {first_name}"
        if why:
            message = f"the correlation's models cannot be asked by one call of series: {why}; ask them one by one"
            raise Refused(Situation.BAD_REQUEST, message, field="model")
    return msgspec.structs.replace(
        first,
        history_length=max(recipe.history_length for recipe in recipes.values()),
        prediction_length=min(recipe.prediction_length for recipe in recipes.values()),
        needs_start=any(recipe.needs_start for recipe in recipes.values()),
    )


def read_inputs(description: bytes, model: str) -> list[str]:
    """The names of the tensors in a worker's description of a model. Raises Refused for an archive that has none."""
    try:
        return [each.name for each in msgspec.json.decode(description, type=_Inputs).inputs]
    except msgspec.ValidationError:
        raise Refused(Situation.BAD_REQUEST, f"the model {model} does not say what its inputs are") from None


def normalize_frequency(text: str) -> str:
    """One spelling of a frequency for all that mean the same: `H`, `h`, `1h`, `60min` and `hour` are `3600s`."""
    found = _ALIAS.fullmatch(text)
    if found is None:
        return text
    count = int(found[1] or 1)
    unit = "month" if found[2] == "M" else _UNITS.get(found[2].lower(), found[2].lower())
    return f"{count * _SECONDS[unit]}s" if unit in _SECONDS else f"{count}{unit}"


def check_frequency(recipe: Recipe, frequency: str, field: str) -> None:
    """Raises Refused for a frequency that is not the archive's."""
    if normalize_frequency(frequency) != normalize_frequency(recipe.frequency):
        message = f"the model forecasts in steps of {recipe.frequency}, not {frequency[:40]!r}"
        raise Refused(Situation.BAD_REQUEST, message, field=field)


def check_horizon(recipe: Recipe, horizon: int, field: str) -> None:
    """Raises Refused for more steps than the archive forecasts, and for fewer where they have covariates."""
    longest = recipe.prediction_length
    if horizon < 1:
        raise Refused(Situation.BAD_REQUEST, f"at least 1 step is forecast, not {horizon}", field=field)
    if horizon > longest:
        message = f"the model forecasts {longest} steps, not {horizon}"
        raise Refused(Situation.BAD_REQUEST, message, field=field)
    if horizon < longest and recipe.dynamic_feat:
        message = f"the model needs covariates for all of its {longest} steps, so it forecasts {longest}, not {horizon}"
        raise Refused(Situation.BAD_REQUEST, message, field=field)


def shift_start(start: str, steps: int, frequency: str) -> str | None:
    """The time of a later step; None where steps are no seconds, or the text is no time."""
    step = normalize_frequency(frequency)
    if not step.endswith("s") or not step[:-1].isdigit():
        return None
    try:
        moved = datetime.fromisoformat(start) + timedelta(seconds=steps * int(step[:-1]))
    except (ValueError, OverflowError):
        return None
    return moved.isoformat(" ", "seconds")


def level_quantiles(level: float) -> tuple[str, str]:
    """The quantiles at the ends of a central interval of `level` percent, in decimals: 97.5 is 0.0125 and 0.9875."""
    low = (1 - Decimal(repr(level)) / 100) / 2
    return _write(low), _write(1 - low)


def _write(number: Decimal) -> str:
    text = f"{number:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text

"""The forecast contract rule by rule: DeepAR's published request and response formats, and what is added to them.

Each rule is a request for an archive with a known network, and the exact answer or the exact place of the refusal; all
of them hold in JSON and, line by line, in JSON Lines.
"""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
from msgspec.structs import replace

from handlers.base import Float32
from handlers.codecs.codec import JSON, LINES, DecodedCall, FamilyCodec
from handlers.codecs.deepar import _interpolate_levels
from handlers.errors import RequestError, RunFailed
from model_store.archives.manifest import ForecastSpec, InputChannel, Scaler

DAY = "2024-01-01"
ONE = ForecastSpec(
    frequency="1h",
    context_length=3,
    prediction_length=2,
    quantile_levels=(0.1, 0.5, 0.9),
    inputs=(InputChannel(source="target"),),
    tail="clamp",
)
PADDED = replace(ONE, pad_context=True)
COVERED = replace(ONE, cat=("zone",), dynamic_feat=("load",), inputs=(*ONE.inputs, InputChannel(source="static")))
#: As the published example's model: any history, two categories, one feature; three days ahead.
PUBLISHED = replace(
    PADDED,
    frequency="D",
    prediction_length=3,
    cat=("shop", "kind"),
    dynamic_feat=("promotion",),
    scaler=Scaler(center=1),
)
#: The network forecasts how the price deviates from the operator's forecast, and reads that too.
RESIDUAL = replace(
    ONE,
    dynamic_feat=("load", "operator"),
    residual_to="operator",
    inputs=(*ONE.inputs, InputChannel(source="dynamic_feat", index=1, shift=2)),
)
OPERATOR = [[7.0] * 5, [10.0, 20.0, 30.0, 100.0, 200.0]]
SEVERAL = replace(
    ONE,
    products=("energy", "reserve"),
    scalers=(Scaler(kind="linear", center=100, scale=10), Scaler()),
    inputs=(InputChannel(source="target"), InputChannel(source="target", product=1, lag=1)),
)
THREE = replace(SEVERAL, products=(*SEVERAL.products, "load"), scalers=(*SEVERAL.scalers, Scaler()))
#: What the network says: of one product [prediction, levels]; of two the same, and the second's ten times as large.
STEPS = np.array([[1, 2, 3], [4, 5, 6], [7, 8, 9]], np.float32)
TARGET = [1.0, 2.0, 3.0]
BOTH = [[100.0, 110.0, 120.0, 130.0], [1.0, 2.0, 3.0, 4.0]]
SAMPLES = {"output_types": ["samples"], "num_samples": 2}


class ContractFamily:
    """Its shapes follow the archive."""

    input_name = "x"

    def __init__(self, forecast: ForecastSpec) -> None:
        self.input_shape = (len(forecast.inputs), forecast.context_length)
        levels = len(forecast.quantile_levels)
        self.output_shape = (forecast.prediction_length, levels * len(forecast.products))


def asked(forecast: ForecastSpec, body: bytes, media: str) -> DecodedCall:
    """The call as a worker decodes it."""
    return FamilyCodec(ContractFamily(forecast), forecast).decode(body, media, "")


def run(forecast: ForecastSpec, call: DecodedCall) -> Float32:
    """`STEPS` for every row, product by product side by side."""
    steps = STEPS[: forecast.prediction_length, : len(forecast.quantile_levels)]
    wide = np.concatenate([steps * 10**i for i in range(len(forecast.products))], axis=1)
    return np.repeat(wide[None], len(call.rows), axis=0)


def predictions(forecast: ForecastSpec, request: dict[str, Any]) -> list[Any]:
    """The answer by JSON, which says that it is JSON."""
    call = asked(forecast, json.dumps(request).encode(), JSON)
    body, media = call.encode(run(forecast, call))
    assert media == JSON
    answer = json.loads(body)
    assert set(answer) == {"predictions"}
    found: list[Any] = answer["predictions"]
    return found


def answered_lines(forecast: ForecastSpec, request: dict[str, Any]) -> list[Any]:
    """The same instances as JSON Lines, each with the configuration."""
    wish = {"configuration": request["configuration"]} if "configuration" in request else {}
    lines = "\n".join(json.dumps({**instance, **wish}) for instance in request["instances"])
    call = asked(forecast, lines.encode(), LINES)
    body, media = call.encode(run(forecast, call))
    assert media == LINES
    return [json.loads(line) for line in body.splitlines()]


def one(start: str = DAY, target: Sequence[Any] = TARGET, **more: Any) -> dict[str, Any]:
    """An instance."""
    return {"start": start, "target": target, **more}


def told(start: str = f"{DAY} 03:00:00", **more: Any) -> dict[str, Any]:
    """A prediction of `ONE` by default: mean and the trained quantiles."""
    return {"start": start, "mean": [2, 5], "quantiles": {"0.1": [1, 4], "0.5": [2, 5], "0.9": [3, 6]}, **more}


def both(**more: Any) -> dict[str, Any]:
    """A prediction of `SEVERAL` by default: each field has a row for each product, in the prices of that product."""
    quantiles = {"0.1": [[110, 140], [10, 40]], "0.5": [[120, 150], [20, 50]], "0.9": [[130, 160], [30, 60]]}
    return {"start": f"{DAY} 04:00:00", "mean": [[120, 150], [20, 50]], "quantiles": quantiles, **more}


class Rule(NamedTuple):
    """A request and the predictions it must get."""

    says: str
    forecast: ForecastSpec
    request: dict[str, Any]
    predictions: list[dict[str, Any]]


def asks(forecast: ForecastSpec, instance: dict[str, Any], **configuration: Any) -> tuple[ForecastSpec, dict[str, Any]]:
    """One instance with a configuration."""
    return forecast, {"instances": [instance], "configuration": configuration}


def plainly(forecast: ForecastSpec, *instances: dict[str, Any]) -> tuple[ForecastSpec, dict[str, Any]]:
    """Instances without a configuration."""
    return forecast, {"instances": instances}


EXAMPLE = {
    "instances": [
        {
            "start": "2009-11-01 00:00:00",
            "target": [4.0, 10.0, "NaN", 100.0, 113.0],
            "cat": [0, 1],
            "dynamic_feat": [[1.0, 1.1, 2.1, 0.5, 3.1, 4.1, 1.2, 5.0]],
        },
        {"start": "2012-01-30", "target": [1.0], "cat": [2, 1], "dynamic_feat": [[2.0, 3.1, 4.5, 1.5]]},
        {"start": "1999-01-30", "target": [2.0, 1.0], "cat": [1, 3], "dynamic_feat": [[1.0, 0.1, -2.5, 0.3, 2.0]]},
    ],
    "configuration": {"num_samples": 50, "output_types": ["mean", "quantiles"], "quantiles": ["0.5", "0.9"]},
}
EXAMPLE_ANSWER = {"mean": [2, 5, 8], "quantiles": {"0.5": [2, 5, 8], "0.9": [3, 6, 9]}}

RULES = [
    Rule(
        "the published example is answered, in request order",
        PUBLISHED,
        EXAMPLE,
        [{"start": f"{start} 00:00:00", **EXAMPLE_ANSWER} for start in ("2009-11-06", "2012-01-31", "1999-02-01")],
    ),
    Rule("the configuration is optional: mean and the archive's levels", *plainly(ONE, one()), [told()]),
    Rule("an empty configuration is the default", *asks(ONE, one()), [told()]),
    Rule("integers are numbers", *plainly(ONE, one(target=[1, 2, 3])), [told()]),
    Rule("null is a missing value", *plainly(ONE, one(target=[1, None, 3])), [told()]),
    Rule('"NaN" is a missing value', *plainly(ONE, one(target=[1, "NaN", 3])), [told()]),
    Rule("all values may be missing", *plainly(ONE, one(target=[None, "NaN", None])), [told(quality=["empty"])]),
    Rule("start may be on the half hour where the archive's day is",
         *plainly(replace(ONE, origin="13:30"), one(f"{DAY} 10:30:00")), [told(f"{DAY} 13:30:00")]),
    Rule("steps of 30 s have seconds", *plainly(replace(ONE, frequency="30s"), one(f"{DAY} 10:00:30")),
         [told(f"{DAY} 10:02:00")]),
    Rule("a day may begin at any full hour", *plainly(replace(ONE, frequency="1D"), one(f"{DAY} 06:00:00")),
         [told("2024-01-04 06:00:00")]),
    Rule("start may be a date alone", *plainly(ONE, one("2023-12-31")), [told("2023-12-31 03:00:00")]),
    Rule("start may have a T and no seconds", *plainly(ONE, one(f"{DAY}T10:00")), [told(f"{DAY} 13:00:00")]),
    Rule("item_id is echoed, text or number", *plainly(ONE, one(item_id="a"), one(item_id=7)),
         [told(item_id="a"), told(item_id=7)]),
    Rule("the model that a call for many names is let through", *plainly(ONE, one(target_model="m")), [told()]),
    Rule("cat and dynamic_feat where the archive has them",
         *plainly(COVERED, one(cat=[0], dynamic_feat=[[1, 2, 3, 4, 5]])), [told()]),
    Rule("cat and dynamic_feat may be null or empty where it has none",
         *plainly(ONE, one(cat=None, dynamic_feat=None), one(cat=[], dynamic_feat=[])), [told(), told()]),
    Rule("a history longer than the context", *plainly(ONE, one(target=[9] * 9)), [told(f"{DAY} 09:00:00")]),
    Rule("a short history where the archive pads", *plainly(PADDED, one(target=[1])), [told(f"{DAY} 01:00:00")]),
    Rule("no history where the archive pads", *plainly(PADDED, one(target=[])),
         [told(f"{DAY} 00:00:00", quality=["empty"])]),
    Rule("only the mean", *asks(ONE, one(), output_types=["mean"]), [{"start": f"{DAY} 03:00:00", "mean": [2, 5]}]),
    Rule("nothing but the start", *asks(ONE, one(), output_types=[]), [{"start": f"{DAY} 03:00:00"}]),
    Rule(
        "levels are echoed as they came, in their order, and interpolated between the trained ones",
        *asks(ONE, one(), output_types=["quantiles"], quantiles=["0.9", "0.30", "1e-1"]),
        [{"start": f"{DAY} 03:00:00", "quantiles": {"0.9": [3, 6], "0.30": [1.5, 4.5], "1e-1": [1, 4]}}],
    ),
    Rule("quantiles: null is the default", *asks(ONE, one(), quantiles=None), [told()]),
    Rule("floor and cap hold", *plainly(replace(ONE, floor=2, cap=5), one()),
         [told(mean=[2.3, 4.7], quantiles={"0.1": [2, 4], "0.5": [2, 5], "0.9": [3, 5]})]),
    Rule("one trained level is every number", *plainly(replace(ONE, quantile_levels=(0.5,)), one()),
         [{"start": f"{DAY} 03:00:00", "mean": [1, 4], "quantiles": {"0.5": [1, 4]}}]),
    Rule("a deviation is added to the covariate that it is from", *plainly(RESIDUAL, one(dynamic_feat=OPERATOR)),
         [told(mean=[102, 205], quantiles={"0.1": [101, 204], "0.5": [102, 205], "0.9": [103, 206]})]),
    Rule("floor and cap are of the price, not of its deviation",
         *plainly(replace(RESIDUAL, floor=103, cap=204.5), one(dynamic_feat=OPERATOR)),
         [told(mean=[103, 204.5 - 0.15], quantiles={"0.1": [103, 204], "0.5": [103, 204.5], "0.9": [103, 204.5]})]),
    Rule("each instance has its own covariate",
         *plainly(RESIDUAL, one(dynamic_feat=OPERATOR), one(dynamic_feat=[[0] * 5, [0] * 5])),
         [told(mean=[102, 205], quantiles={"0.1": [101, 204], "0.5": [102, 205], "0.9": [103, 206]}), told()]),
    Rule("several products: a row for each", *plainly(SEVERAL, one(target=BOTH)), [both()]),
    Rule("several products: each row has its own missing values",
         *plainly(SEVERAL, one(target=[[None, 1, 2, 3], [1, 2, "NaN", None]])), [both()]),
    Rule("several products: only the mean", *asks(SEVERAL, one(target=BOTH), output_types=["mean"]),
         [{"start": f"{DAY} 04:00:00", "mean": [[120, 150], [20, 50]]}]),
    Rule("several products: levels between",
         *asks(SEVERAL, one(target=BOTH), output_types=["quantiles"], quantiles=["0.3"]),
         [{"start": f"{DAY} 04:00:00", "quantiles": {"0.3": [[115, 145], [15, 45]]}}]),
    Rule("several products: one floor for all",
         *asks(replace(SEVERAL, floor=115), one(target=BOTH), output_types=["quantiles"], quantiles=["0.1"]),
         [{"start": f"{DAY} 04:00:00", "quantiles": {"0.1": [[115, 140], [115, 115]]}}]),
    Rule("several products: padded together",
         *plainly(replace(SEVERAL, pad_context=True), one(target=[[], []])),
         [both(start=f"{DAY} 00:00:00", quality=["empty"])]),
]  # fmt: skip


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.says)
def test_what_is_answered(rule: Rule) -> None:
    """Exactly the fields that were asked for, the zone, and the numbers of the known network."""
    found = predictions(rule.forecast, rule.request)
    lines = answered_lines(rule.forecast, rule.request)
    assert {each.pop("time_zone") for each in (*found, *lines)} == {rule.forecast.time_zone}
    assert [set(each) for each in found] == [set(each) for each in rule.predictions]
    for mine, right in zip(found, rule.predictions, strict=True):
        assert list(mine.get("quantiles", {})) == list(right.get("quantiles", {}))
        for field, value in right.items():
            assert close(mine[field], value), (field, mine[field])
    assert lines == found


def close(mine: Any, right: Any) -> bool:
    """Numbers but for float32's last bits, everything else exactly."""
    if isinstance(right, dict):
        return mine.keys() == right.keys() and all(close(mine[key], right[key]) for key in right)
    if isinstance(right, list) and not isinstance(right[0], str):
        return np.shape(mine) == np.shape(right) and bool(np.allclose(mine, right, rtol=1e-6))
    return bool(mine == right)


class Refusal(NamedTuple):
    """A wrong instance or configuration: the place and words of what is said."""

    says: str
    forecast: ForecastSpec
    request: dict[str, Any]
    field: str | None
    words: str


REFUSALS = [
    Refusal("start lies on a step", *plainly(ONE, one(f"{DAY} 00:17:00")), "start", "start at 00:00:00, 01:00:00 and"),
    Refusal("start lies on a step of seconds", *plainly(ONE, one(f"{DAY} 10:00:30")), "start", "not at 10:00:30"),
    Refusal("an instant lies on a step too", *plainly(ONE, one(f"{DAY} 00:17:00+01:00")), "start", "not at 00:17:00"),
    Refusal("a step is counted from the archive's time of day",
            *plainly(replace(ONE, origin="13:30"), one(f"{DAY} 10:00:00")), "start", "00:30:00, 01:30:00 and so on"),
    Refusal("a day begins at a full hour",
            *plainly(replace(ONE, frequency="1D"), one(f"{DAY} 00:17:00")), "start", "steps of 1D"),
    Refusal("unknown keys of an instance are refused", *plainly(ONE, one(dynamic_feats=[])), "dynamic_feats",
            "did you mean dynamic_feat.*start, target, cat, dynamic_feat, item_id"),
    Refusal("start is needed", *plainly(ONE, {"target": TARGET}), "start", "missing"),
    Refusal("target is needed", *plainly(ONE, {"start": DAY}), "target", "missing"),
    Refusal("an offset has minutes", *plainly(ONE, one(f"{DAY} 00:00:00+10")), "start", "an offset such as"),
    Refusal("an offset needs a known zone", *plainly(replace(ONE, time_zone="NEM"), one(f"{DAY} 00:00:00+10:00")),
            "start", "'NEM' is not an IANA time zone"),
    Refusal("start has no fractions", *plainly(ONE, one(f"{DAY} 00:00:00.5")), "start", "YYYY-MM-DD HH:MM:SS"),
    Refusal("start is a day that exists", *plainly(ONE, one("2023-02-29")), "start", "not '2023-02-29'"),
    Refusal("the forecast is a time", *plainly(ONE, one("9999-12-31 23:00:00")), "start", "year 9999"),
    Refusal("text is no number", *plainly(ONE, one(target=[1, "2", 3])), "target[1]", "'2'"),
    Refusal("true is no number", *plainly(ONE, one(target=[1, True, 3])), "target[1]", "not true or false"),
    Refusal("numbers fit the network", *plainly(ONE, one(target=[1, 2, 1e200])), None, "not finite"),
    Refusal("a short history names both lengths", *plainly(ONE, one(target=[1, 2])), "target", "2 steps.*needs 3"),
    Refusal("cat where the archive has it",
            *plainly(COVERED, one(dynamic_feat=[[1] * 5])), "cat", r"1 numbers \(zone\)"),
    Refusal("dynamic_feat likewise", *plainly(COVERED, one(cat=[1])), "dynamic_feat", r"1 rows \(load\), not 0"),
    Refusal("cat only there", *plainly(ONE, one(cat=[1])), "cat", "needs 0"),
    Refusal("dynamic_feat only there", *plainly(ONE, one(dynamic_feat=[[1] * 5])), "dynamic_feat", "needs 0"),
    Refusal("cat counts from 0", *plainly(COVERED, one(cat=[-1])), "cat[0]", "of at least 0"),
    Refusal("cat is whole", *plainly(COVERED, one(cat=[0.5])), "cat[0]", "a whole number, not a fraction"),
    Refusal("dynamic_feat reaches over target and prediction",
            *plainly(COVERED, one(cat=[1], dynamic_feat=[[1] * 3])), "dynamic_feat[0]", "3 numbers.*have 5"),
    Refusal("dynamic_feat has no null",
            *plainly(COVERED, one(cat=[1], dynamic_feat=[[1, 2, None, 4, 5]])), "dynamic_feat[0][2]", "null"),
    Refusal('dynamic_feat has no "NaN"',
            *plainly(COVERED, one(cat=[1], dynamic_feat=[[1, 2, "NaN", 4, 5]])), "dynamic_feat[0][2]", "not text"),
    Refusal("what a deviation is from is needed", *plainly(RESIDUAL, one()), "dynamic_feat", "needs 2 rows"),
    Refusal("what a deviation is from has no null",
            *plainly(RESIDUAL, one(dynamic_feat=[[1] * 5, [1, 2, 3, 4, None]])), "dynamic_feat[1][4]", "null"),
    Refusal("what a deviation is from is a price",
            *plainly(RESIDUAL, one(dynamic_feat=[[1] * 5, [1, 2, 3, 4, 1e200]])), "dynamic_feat[1]", "beyond 1e.30"),
    Refusal("item_id is text or a number", *plainly(ONE, one(item_id=[1])), "item_id", "a list"),
    Refusal("unknown settings are refused", *asks(ONE, one(), num_sample=1), "configuration.num_sample",
            "did you mean num_samples"),
    Refusal("unknown kinds of output",
            *asks(ONE, one(), output_types=["median"]), "configuration.output_types[0]", "one of mean, .*not 'median'"),
    Refusal("levels are text", *asks(ONE, one(), quantiles=[0.5]), "configuration.quantiles[0]",
            "expected text, not a fraction"),
    Refusal("levels are numbers", *asks(ONE, one(), quantiles=["p50"]), "configuration.quantiles", "'p50'"),
    Refusal("levels are below the trained range", *asks(ONE, one(), quantiles=["0.05"]), "configuration.quantiles",
            "0.05 is outside the trained range 0.1 to 0.9"),
    Refusal("and not above it", *asks(ONE, one(), quantiles=["0.5", "0.95"]), "configuration.quantiles", "0.1 to 0.9"),
    Refusal("some level", *asks(ONE, one(), quantiles=[]), "configuration.quantiles", "at least 1"),
    Refusal("some sample", *asks(ONE, one(), num_samples=0), "configuration.num_samples", "at least 1"),
    Refusal("not too many samples", *asks(ONE, one(), num_samples=10_001), "configuration.num_samples",
            "at most 10000"),
    Refusal("a seed counts from 0", *asks(ONE, one(), seed=-1), "configuration.seed", "at least 0"),
    Refusal("samples need a tail rule",
            *asks(replace(ONE, tail="none"), one(), **SAMPLES), "configuration.output_types",
            "tail"),
    Refusal("joint needs many models", *asks(ONE, one(), joint=True), "configuration.joint", "several models"),
    Refusal("one product: [T]", *plainly(ONE, one(target=[TARGET])), "target", r"this one has one: send \[T\]"),
    Refusal("several products: [D][T]",
            *plainly(SEVERAL, one()), "target", r"2 products \(energy, reserve\): send \[D\]"),
    Refusal("several products: no null for a row",
            *plainly(SEVERAL, one(target=[BOTH[0], None])), "target", r"send \[D\]"),
    Refusal("several products: as many rows",
            *plainly(SEVERAL, one(target=BOTH[:1])), "target", "a row for each, not 1"),
    Refusal("several products: not more", *plainly(SEVERAL, one(target=[*BOTH, TARGET])), "target", "not 3"),
    Refusal("several products: none", *plainly(SEVERAL, one(target=[])), "target", "not 0"),
    Refusal("several products: equally long",
            *plainly(SEVERAL, one(target=[BOTH[0], TARGET])), "target[1]", "3 steps of reserve, but 4 of energy"),
    Refusal("several products: the first is not shorter",
            *plainly(SEVERAL, one(target=[BOTH[0], [*BOTH[1], 5.0]])), "target[1]", "5 steps of reserve, but 4"),
    Refusal("several products: nor the last of three",
            *plainly(THREE, one(target=[*BOTH, TARGET])), "target[2]", "3 steps of load, but 4 of energy"),
    Refusal("several products: padding fills up the past of all, not the rows of one",
            *plainly(replace(SEVERAL, pad_context=True), one(target=[BOTH[0], TARGET])), "target[1]", "fill up"),
    Refusal("several products: long enough for each lag",
            *plainly(SEVERAL, one(target=[TARGET, TARGET])), "target", "3 steps, but the model needs 4"),
    Refusal("several products: text is no number",
            *plainly(SEVERAL, one(target=[BOTH[0], [1, 2, "x", 4]])), "target[1][2]", "'x'"),
]  # fmt: skip


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda refusal: refusal.says)
def test_what_is_refused(refusal: Refusal) -> None:
    """By the place and the reason: of the whole request in JSON, of its own line in JSON Lines."""
    field = refusal.field
    with pytest.raises(RequestError, match=refusal.words) as caught:
        predictions(refusal.forecast, refusal.request)
    assert caught.value.field == field
    of_all = (field or "").startswith("configuration")
    assert caught.value.instance == (None if of_all else 0)
    (line,) = answered_lines(refusal.forecast, refusal.request)
    assert line["error"]["code"] == "bad_request"
    assert line["error"].get("field") == field
    assert line["error"]["message"].removesuffix(", configuration") == caught.value.message


def test_samples_are_num_samples_futures() -> None:
    """`samples` is [S][T], of several products [S][D][T], within the range of each step's quantiles."""
    for forecast, target, shape in ((ONE, TARGET, (2, 2)), (SEVERAL, BOTH, (2, 2, 2))):
        _, request = asks(forecast, one(target=target), **SAMPLES, seed=1)
        (found,) = predictions(forecast, request)
        assert set(found) == {"start", "time_zone", "samples", "warnings"}
        drawn = np.array(found["samples"])
        assert drawn.shape == shape
        (told_quantiles,) = predictions(forecast, {"instances": [one(target=target)]})
        quantiles = told_quantiles["quantiles"]
        assert (drawn >= np.array(quantiles["0.1"])).all()
        assert (drawn <= np.array(quantiles["0.9"])).all()
        (default,) = predictions(forecast, asks(forecast, one(target=target), output_types=["samples"])[1])
        assert len(default["samples"]) == 100


def test_samples_of_each_product_follow_its_own_quantiles() -> None:
    """A thousand draws of every product and step have its mean; products and steps are drawn by themselves."""
    _, request = asks(SEVERAL, one(target=BOTH), output_types=["samples", "mean"], num_samples=1000, seed=1)
    (found,) = predictions(SEVERAL, request)
    drawn = np.array(found["samples"])
    assert drawn.mean(axis=0) == pytest.approx(np.array(found["mean"]), rel=0.02)
    assert np.abs(np.corrcoef(drawn.reshape(1000, -1).T) - np.eye(4)).max() < 0.1


def test_the_same_seed_draws_the_same() -> None:
    """Another seed, or none, draws others."""
    for forecast, target in ((ONE, TARGET), (SEVERAL, BOTH)):
        found = [predictions(*asks(forecast, one(target=target), **SAMPLES, seed=seed)) for seed in (1, 1, 2, None)]
        assert found[0] == found[1]
        assert found[0] != found[2]
        assert found[0] != found[3]


def test_quantiles_leave_sorted() -> None:
    """Crossed ones are sorted, each product by itself."""
    call = asked(SEVERAL, json.dumps({"instances": [one(target=BOTH)]}).encode(), JSON)
    crossed = run(SEVERAL, call)[..., [2, 0, 1, 5, 4, 3]]
    assert json.loads(call.encode(crossed)[0])["predictions"] == [both(time_zone="UTC")]


@pytest.mark.parametrize("wrong", [np.nan, np.inf, 3e38])
def test_non_finite_output_is_a_model_error(wrong: float) -> None:
    """Of any product, and where only the price overflows: never a number; in JSON Lines an error on its line."""
    for media, code in ((JSON, ""), (LINES, "model_failed")):
        line = json.dumps(one(target=BOTH))
        call = asked(SEVERAL, f'{{"instances":[{line}]}}'.encode() if media == JSON else line.encode(), media)
        outputs = run(SEVERAL, call)
        outputs[0, 1, 1] = wrong
        if code:
            assert json.loads(call.encode(outputs)[0])["error"]["code"] == code
        else:
            with pytest.raises(RunFailed):
                call.encode(outputs)


def test_the_network_sees_each_product_scaled_by_its_own() -> None:
    """Channel 0 is energy less 100 in tens, channel 1 is reserve one step earlier, and a gap takes what was before."""
    body = json.dumps({"instances": [one(target=BOTH), one(target=[[100, None, 120, 130], [1, 2, None, 4]])]})
    rows = asked(SEVERAL, body.encode(), JSON).rows
    assert rows.tolist() == [[[1, 2, 3], [1, 2, 3]], [[0, 2, 3], [1, 2, 2]]]


def test_a_network_may_have_an_axis_for_products() -> None:
    """[prediction, D, levels] and [prediction, D * levels] are the same answer."""
    call = asked(SEVERAL, json.dumps({"instances": [one(target=BOTH)]}).encode(), JSON)
    flat = run(SEVERAL, call)
    assert call.encode(flat.reshape(1, 2, 2, 3)) == call.encode(flat)


def test_samples_of_all_products_are_bounded() -> None:
    """The limit counts every number: what one product may ask, forty may not."""
    wide = replace(SEVERAL, products=tuple(f"p{i}" for i in range(400)), scalers=())
    request = asks(wide, one(target=[[1, 2, 3, 4]] * 400), output_types=["samples"], num_samples=10_000)
    with pytest.raises(RequestError, match="8000000 numbers") as caught:
        predictions(*request)
    assert caught.value.field == "configuration.num_samples"


def test_a_level_just_below_a_trained_one_is_not_above_it() -> None:
    """A weight that rounds to one would be the last bit too high: -0.9 + (3.7 - -0.9) is more than 3.7."""
    above = 0.5 - 2.0**-54  # less 2**-55, a tie, it is rounded down to what its neighbour is rounded up to
    low, high = -0.9, 3.7
    assert low + (high - low) > high
    levels = _interpolate_levels(["a", "b"], np.array([np.nextafter(above, 0), above]), np.array([2.0**-55, above]))
    assert levels.weight[0] == 1
    below, at = levels.of(np.array([low, high]))
    assert below <= at == high


def test_unknown_keys_of_a_request_are_refused() -> None:
    """A misspelt configuration is not left out in silence."""
    with pytest.raises(
        RequestError, match=r"did you mean configuration\?; there are instances, configuration"
    ) as caught:
        predictions(ONE, {"instances": [one()], "config": {}})
    assert (caught.value.instance, caught.value.field) == (None, "config")


def test_the_network_sees_deviations_from_the_operator() -> None:
    """The history less the covariate, a missing price as the last deviation, and the covariate as its channel says."""
    body = json.dumps({"instances": [one(target=[12.0, None, 33.0], dynamic_feat=OPERATOR)]}).encode()
    (row,) = asked(RESIDUAL, body, JSON).rows
    assert row.tolist() == [[2, 2, 3], [30, 100, 200]]


def test_samples_and_marginals_are_prices_too() -> None:
    """All samples of a step lie within the outer quantiles of its price, and a marginal has these."""
    kinds = {"output_types": ["samples", "marginal"], "num_samples": 50, "seed": 1}
    (answer,) = predictions(*asks(RESIDUAL, one(dynamic_feat=OPERATOR), **kinds))
    samples = np.array(answer["samples"])
    assert ((samples >= [101, 204]) & (samples <= [103, 206])).all()
    assert answer["marginal"]["values"] == [[[101, 102, 103], [204, 205, 206]]]


def test_deviations_on_a_day_of_25_hours() -> None:
    """Real steps: the repeated hour of the covariate is one slot's mean, and both steps of that slot get the price."""
    forecast = replace(RESIDUAL, time_zone="Europe/Berlin", prediction_length=3)
    operator = [10.0, 20.0, 30.0, 100.0, 200.0, 300.0, 400.0]
    instance = one("2024-10-26 23:00:00+02:00", dynamic_feat=[[7.0] * 7, operator])
    (answer,) = predictions(*plainly(forecast, instance))
    assert answer["start"] == "2024-10-27 02:00:00+02:00"
    steps = STEPS[:, 1].tolist()
    assert len(answer["quantiles"]["0.5"]) == len(operator) - 3
    assert answer["quantiles"]["0.5"][0] == answer["quantiles"]["0.5"][1] == 150 + steps[0]

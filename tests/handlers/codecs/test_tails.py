"""The exponential tail rule: quantiles stay, samples and scenarios go on beyond the outer levels, and clients know."""

from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from handlers.codecs.codec import describe_forecast
from handlers.codecs.deepar import DeepAr
from handlers.codecs.joint import JointCodec, JointModel
from handlers.codecs.scenarios import CorrelationModel, Gaussian, Marginal
from handlers.codecs.tails import ExponentialTails
from handlers.errors import RequestError
from handlers.training.tails import UNSEEN, fit_tails
from model_store.archives.manifest import CorrelationSpec, ForecastSpec, InputChannel, Tails

LEVELS = (0.01, 0.1, 0.5, 0.9, 0.99)
TAILS = Tails(low=0.5, high=2.0, band=(0.1, 0.9))
CLAMPED = ForecastSpec(
    frequency="1h",
    context_length=2,
    prediction_length=2,
    quantile_levels=LEVELS,
    inputs=(InputChannel(source="target"),),
    tail="clamp",
)
OPEN = replace(CLAMPED, tail="exponential", tails=TAILS)
OUTPUT = np.array([[[0, 1, 5, 11, 20], [-3, -2, -1, 0, 1]]], np.float32)
STEPS, SAMPLES = 2, 10_000


def answer(forecast: ForecastSpec, **configuration: Any) -> dict[str, Any]:
    """The prediction for one instance whose network gives OUTPUT."""
    body = {"instances": [{"start": "2024-01-01", "target": [1, 2]}], "configuration": configuration}
    _, encode = DeepAr(forecast).decode(msgspec.json.encode(body))
    found: dict[str, Any] = msgspec.json.decode(encode(OUTPUT))["predictions"][0]
    return found


def draw(forecast: ForecastSpec) -> np.ndarray[Any, Any]:
    """Samples [SAMPLES, STEPS] of that instance."""
    return np.array(answer(forecast, output_types=["samples"], num_samples=SAMPLES, seed=1)["samples"])


def make_independent() -> CorrelationModel:
    """A correlation of one product whose steps do not depend on each other."""
    record = CorrelationSpec(products=("m",), horizon=STEPS, method="gaussian", windows=8)
    return CorrelationModel(record, Gaussian(np.eye(1), np.eye(STEPS)))


def draw_jointly(forecast: ForecastSpec, samples: int) -> np.ndarray[Any, Any]:
    """Joint scenarios [samples, STEPS] of the marginal that a model sends."""
    marginal = answer(forecast, output_types=["marginal"])["marginal"]
    correlation = make_independent()
    body = {"forecasts": [{"name": "m", "marginal": marginal}], "num_samples": samples, "seed": 3}
    call = JointCodec(correlation).decode(msgspec.json.encode(body), "", "")
    written, _ = JointModel(correlation).run(call.feeds)
    return np.array(msgspec.json.decode(written)["samples"][0])


def test_quantiles_do_not_change() -> None:
    """An answer of quantiles has the same bytes with either rule, so that it costs nothing."""
    asked = {"output_types": ["quantiles"], "quantiles": ["0.01", "0.3", "0.99"]}
    assert answer(OPEN, **asked) == answer(CLAMPED, **asked)


def test_samples_lie_beyond_the_outer_levels_as_the_rule_says() -> None:
    """One of a hundred lies beyond each outer quantile, by the mean distance of the rule; with flat tails none."""
    drawn, flat = draw(OPEN), draw(CLAMPED)
    assert (flat.min(0).tolist(), flat.max(0).tolist()) == ([0, -3], [20, 1])
    assert ((flat == 20).mean(), (flat == 0).mean()) == pytest.approx((0.005, 0.005), abs=0.002)
    for step, (low, high, width) in enumerate(((0, 20, 10), (-3, 1, 2))):
        under, over = low - drawn[:, step], drawn[:, step] - high
        assert ((under > 0).mean(), (over > 0).mean()) == pytest.approx((0.01, 0.01), abs=0.003)
        assert under[under > 0].mean() == pytest.approx(0.5 * width, rel=0.25)
        assert over[over > 0].mean() == pytest.approx(2 * width, rel=0.25)
    inside = (flat > [0, -3]) & (flat < [20, 1])
    np.testing.assert_array_equal(drawn[inside], flat[inside])


def test_joint_scenarios_have_the_same_tails() -> None:
    """The marginal carries the rule, and the outermost of 1000 scenarios is the quantile at 0.9995."""
    drawn = np.sort(draw_jointly(OPEN, 1000), axis=0)
    far = 2 * np.log(0.01 / 0.0005) * np.array([10, 2])
    np.testing.assert_allclose(drawn[-1], np.array([20, 1]) + far, rtol=1e-5)
    np.testing.assert_allclose(drawn[0], np.array([0, -3]) - far / 4, rtol=1e-5)
    assert np.sort(draw_jointly(CLAMPED, 1000), axis=0)[[0, -1]].tolist() == [[0, -3], [20, 1]]


def test_the_mean_is_that_of_the_samples() -> None:
    """`mean` counts both tails, and stays within floor and cap."""
    np.testing.assert_allclose(answer(OPEN)["mean"], draw(OPEN).mean(0), atol=0.15)
    assert answer(OPEN)["mean"] != answer(CLAMPED)["mean"]
    capped = replace(OPEN, tails=replace(TAILS, high=900.0), cap=30.0, floor=-5.0)
    assert answer(capped)["mean"][0] == 30


def test_floor_and_cap_hold_in_the_tails() -> None:
    """No sample and no scenario leaves [floor, cap], and none is infinite where a tail leaves float32."""
    bounded = replace(OPEN, floor=-4.0, cap=25.0)
    for drawn in (draw(bounded), draw_jointly(bounded, 1000)):
        assert (drawn.min(), drawn.max()) == (-4, 25)
    far = Marginal("m", np.array(LEVELS), np.array([[0, 1, 2, 3, 3e38]]), tails=ExponentialTails(0, 1000, (0, 4)))
    assert np.isfinite(far.quantiles(np.array([0.5, 0.999999]))).all()


@given(st.lists(st.floats(0, 1), min_size=2, max_size=40))
def test_quantiles_rise_with_the_probability(points: list[float]) -> None:
    """The quantile function is monotone across the outer levels too."""
    marginal = Marginal("m", np.array(LEVELS), OUTPUT[0].astype(np.float64), tails=ExponentialTails.of(OPEN))
    assert (np.diff(marginal.quantiles(np.sort(np.array(points)))) >= 0).all()


@pytest.mark.parametrize(
    ("tails", "field"),
    [
        ({"low": 1, "high": 1, "band": [3, 1]}, "marginal.tails.band"),
        ({"low": 1, "high": 1, "band": [0, 9]}, "marginal.tails.band"),
        ({"low": -1, "high": 1, "band": [0, 1]}, ""),
        ({"low": 1, "high": 1e9, "band": [0, 1]}, ""),
        ({"low": 1, "high": 1, "band": [0, 1], "floor": 2, "cap": 1}, "marginal.tails.floor"),
    ],
)
def test_a_wrong_rule_in_a_marginal_is_refused(tails: dict[str, Any], field: str) -> None:
    """A client may send a marginal of its own: the message names the field."""
    marginal = {**answer(CLAMPED, output_types=["marginal"])["marginal"], "tails": tails}
    body = msgspec.json.encode({"forecasts": [{"name": "m", "marginal": marginal}]})
    with pytest.raises(RequestError, match=r"tails|two of the 5 levels|floor") as caught:
        JointCodec(make_independent()).decode(body, "", "")
    assert (caught.value.field or "") == field


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tail": "clamp"}, "belongs to the tail rule exponential"),
        ({"tails": msgspec.UNSET}, "belongs to the tail rule exponential"),
        ({"tails": replace(TAILS, band=(0.2, 0.9))}, "must be two of the levels"),
        ({"tails": replace(TAILS, band=(0.9, 0.1))}, "must be two of the levels"),
        ({"paths": 100}, "tails of its paths"),
    ],
)
def test_a_record_whose_rule_is_wrong_is_refused(changes: dict[str, Any], said: str) -> None:
    """`tails` and `tail` belong together."""
    with pytest.raises(ValueError, match=said):
        replace(OPEN, **changes)


def test_clients_are_warned_of_narrow_levels() -> None:
    """A field and a mark where samples or joint scenarios are asked of levels inside 0.05 and 0.95; else neither."""
    narrow = replace(CLAMPED, quantile_levels=(0.1, 0.2, 0.5, 0.8, 0.9))
    for kind in ("samples", "marginal"):
        assert answer(narrow, output_types=[kind])["warnings"] == ["narrow-levels"]
        assert "warnings" not in answer(OPEN, output_types=[kind])
    assert "warnings" not in answer(narrow)
    body = {
        "instances": [{"start": "2024-01-01", "target": [1, 2]}] * 3,
        "configuration": {"output_types": ["samples"]},
    }
    assert DeepAr(narrow).decode(msgspec.json.encode(body))[1].marks.warnings == "narrow-levels=3"
    line = msgspec.json.encode({**body["instances"][0], "configuration": body["configuration"]})  # type: ignore[index]
    plain = msgspec.json.encode(body["instances"][0])  # type: ignore[index]
    assert DeepAr(narrow).decode_lines(line + b"\n" + plain)[1].marks.warnings == "narrow-levels=1"


def test_the_rule_is_shown() -> None:
    """A description says how far the tails reach; that of older archives has its words of before."""
    assert describe_forecast(CLAMPED)["tail"] == "clamp beyond 0.01 and 0.99"
    said = str(describe_forecast(replace(OPEN, tails=replace(TAILS, beyond=(7, 9))))["tail"])
    assert said.startswith("exponential beyond 0.01 and 0.99, by 0.5 and 2 widths of the band 0.1 to 0.9")
    assert said.endswith("from 7 and 9 past prices")


def test_the_fit_finds_the_distances() -> None:
    """The mean distance beyond each outer quantile in widths of the band; missing prices and empty bands count not."""
    y = np.array([[-1.0, 25.0, 5.0, np.nan, -3.0, 99.0]]).T
    q = np.tile(OUTPUT[0, :1].astype(np.float64), (6, 1, 1))
    q[5] = 0.0  # a forecast without a band
    found = fit_tails(y, q, np.array(LEVELS))
    assert found == Tails(low=0.2, high=0.5, band=(0.1, 0.9), beyond=(2, 1))
    assert fit_tails(y[2:3], q[2:3], np.array(LEVELS)) == Tails(low=UNSEEN, high=UNSEEN, band=(0.1, 0.9))

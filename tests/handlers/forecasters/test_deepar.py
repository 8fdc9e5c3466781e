"""DeepAR JSON: recipes, calendar, interpolation and mean worked out by hand, and every refusal by its place."""

from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from handlers.codecs.codec import NPY, FamilyCodec
from handlers.codecs.deepar import DeepAr, compute_mean_weights
from handlers.codecs.deepar_schema import MAX_ROWS
from handlers.codecs.features import compute_calendar_feature, from_network, parse_step_seconds, to_network
from handlers.errors import RequestError, RunFailed, UnsupportedMedia
from model_store.archives.manifest import ForecastSpec, InputChannel, Scaler
from model_store.errors import ArchiveInvalid

#: Three hours in, two out; five channels, one of every source and a lag.
FORECAST = ForecastSpec(
    frequency="1h",
    context_length=3,
    prediction_length=2,
    quantile_levels=(0.1, 0.5, 0.9),
    scaler=Scaler(kind="linear", center=10, scale=2),
    dynamic_feat=("load",),
    cat=("zone",),
    inputs=(
        InputChannel(source="target"),
        InputChannel(source="target", lag=2),
        InputChannel(source="dynamic_feat", shift=2, scaler=Scaler(kind="linear", center=0, scale=10)),
        InputChannel(source="calendar", feature="hour_sin", shift=2),
        InputChannel(source="static"),
    ),
)
INSTANCE: dict[str, Any] = {
    "start": "2024-01-01 00:00:00",
    "target": [8, 10, 12, 14, 16, 18],
    "dynamic_feat": [[0, 10, 20, 30, 40, 50, 60, 70]],
    "cat": [3],
}
#: Network quantiles of two steps, the first crossed: prices 12, 8, 10 and 10, 11, 12.
OUTPUT = np.array([[[1, -1, 0], [0, 0.5, 1]]], np.float32)
PLAIN = replace(FORECAST, dynamic_feat=(), cat=(), inputs=(InputChannel(source="target"),))


def body(*instances: dict[str, Any], **configuration: Any) -> bytes:
    """A request's body."""
    return orjson.dumps({"instances": instances} | ({"configuration": configuration} if configuration else {}))


def rows(forecast: ForecastSpec, *instances: dict[str, Any]) -> list[Any]:
    """The network rows of a request, rounded to four digits."""
    found, _ = DeepAr(forecast).decode(body(*instances))
    rounded: list[Any] = np.round(found.astype(np.float64), 4).tolist()
    return rounded


def answer(forecast: ForecastSpec, output: np.ndarray[Any, Any], **configuration: Any) -> dict[str, Any]:
    """The prediction of one plain instance of three steps, for these network quantiles."""
    _, encode = DeepAr(forecast).decode(body({"start": "2024-01-01", "target": [1, 2, 3]}, **configuration))
    prediction: dict[str, Any] = orjson.loads(encode(output))["predictions"][0]
    return prediction


def test_a_recipe_by_hand() -> None:
    """Six steps of history: the context is steps 3-5, its lag 1-3, and what is known ahead is shifted to 5-7."""
    assert rows(FORECAST, INSTANCE) == [
        [[2, 3, 4], [0, 1, 2], [5, 6, 7], [0.9659, 1, 0.9659], [3, 3, 3]],
    ]


def test_the_answer_by_hand() -> None:
    """Quantiles are sorted prices; the mean has weights 0.3, 0.4, 0.3; start is the first step after the history."""
    _, encode = DeepAr(FORECAST).decode(body(INSTANCE | {"item_id": "NSW1"}))
    assert orjson.loads(encode(OUTPUT)) == {
        "predictions": [
            {
                "item_id": "NSW1",
                "start": "2024-01-01 06:00:00",
                "time_zone": "UTC",
                "mean": [10.0, 11.0],
                "quantiles": {"0.1": [8.0, 10.0], "0.5": [10.0, 11.0], "0.9": [12.0, 12.0]},
            }
        ]
    }


def test_a_longer_history_changes_nothing_but_the_calendar() -> None:
    """Only the last steps are read: the same end of a longer series is the same row."""
    longer = INSTANCE | {
        "start": "2023-12-31 22:00:00",
        "target": [99, 99, *INSTANCE["target"]],
        "dynamic_feat": [[7, 7, *INSTANCE["dynamic_feat"][0]]],
    }
    assert rows(FORECAST, longer, INSTANCE) == [*rows(FORECAST, INSTANCE)] * 2


def test_missing_targets_take_the_last_known_value() -> None:
    """Both null and "NaN" repeat what was last known, also from before the context; before any value, the center."""
    start = {"start": "2024-01-01"}
    assert rows(PLAIN, start | {"target": [14, None, "NaN", 12]}) == [[[2, 2, 1]]]
    assert rows(PLAIN, start | {"target": [None, 14, None]}) == [[[0, 2, 2]]]
    assert rows(PLAIN, start | {"target": [None, None, "NaN"]}) == [[[0, 0, 0]]]


def test_padding_where_the_archive_allows_it() -> None:
    """Steps before a short history are the scalers' centers, and the calendar runs on before the start."""
    padded = replace(FORECAST, pad_context=True)
    short = INSTANCE | {"target": [14, 16], "dynamic_feat": [[10, 20, 30, 40]]}
    assert rows(padded, short) == [[[0, 2, 3], [0, 0, 0], [2, 3, 4], [0.2588, 0.5, 0.7071], [3, 3, 3]]]
    assert rows(padded, INSTANCE) == rows(FORECAST, INSTANCE)
    empty = INSTANCE | {"target": [], "dynamic_feat": [[10, 20]]}
    assert rows(padded, empty)[0][2] == [0, 1, 2]


@pytest.mark.parametrize(
    ("stamp", "feature", "expected"),
    [
        ("2024-01-01T06:00", "hour_sin", 1),
        ("2024-01-01T06:00", "hour_cos", 0),
        ("2024-01-01T03:00", "hour_sin", np.sqrt(0.5)),
        ("2024-01-01T00:30", "hour_sin", np.sin(2 * np.pi * 0.5 / 24)),
        ("1969-12-31T18:00", "hour_sin", -1),
        ("2024-01-01T23:00", "weekday_cos", 1),  # a Monday
        ("2024-01-01T23:00", "weekday_sin", 0),
        ("2024-01-03T00:00", "weekday_sin", np.sin(2 * np.pi * 2 / 7)),
        ("1969-12-31T00:00", "weekday_sin", np.sin(2 * np.pi * 2 / 7)),  # a Wednesday
        ("2024-03-01T23:59", "weekend", 0),  # a Friday
        ("2024-03-02T00:00", "weekend", 1),
        ("2024-03-03T23:59", "weekend", 1),
        ("2024-01-01T12:00", "year_cos", 1),
        ("2024-12-31T00:00", "year_sin", np.sin(2 * np.pi * 365 / 365.25)),  # a leap year
        ("2023-03-01T00:00", "year_cos", np.cos(2 * np.pi * 59 / 365.25)),
    ],
)
def test_calendar_at_known_dates(stamp: str, feature: str, expected: float) -> None:
    """Turns start at midnight, Monday and 1 January, before 1970 too."""
    seconds = np.array([np.datetime64(stamp, "s").astype(np.int64)])
    assert compute_calendar_feature(seconds, feature)[0] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("frequency", "seconds"),
    [("5min", 300), ("15min", 900), ("30min", 1800), ("1h", 3600), ("D", 86400), ("2W", 1209600)],
)
def test_frequencies(frequency: str, seconds: int) -> None:
    """Aliases of pandas of fixed length."""
    assert parse_step_seconds(frequency) == seconds


@pytest.mark.parametrize("frequency", ["1M", "QS", "0h", "-1h", "1 h", "1h30min", "hour"])
def test_other_frequencies_are_refused_at_load(frequency: str) -> None:
    """A month has no fixed length: the archive is refused, not each request."""
    with pytest.raises(ArchiveInvalid, match=r"forecast\.frequency"):
        FamilyCodec(Tensor(), replace(FORECAST, frequency=frequency))


def test_a_target_channel_with_a_scaler_is_refused_at_load() -> None:
    """It would be ignored: the archive's own scaler applies."""
    twice = InputChannel(source="target", scaler=Scaler(kind="asinh"))
    with pytest.raises(ArchiveInvalid, match=r"inputs\[0\]\.scaler"):
        DeepAr(replace(PLAIN, inputs=(twice,)))


class Tensor:
    """The shapes of FORECAST."""

    input_name = "x"
    input_shape = (5, 3)
    output_shape = (2, 3)


def test_levels_between_the_trained_ones_are_interpolated() -> None:
    """0.3 lies half-way between 0.1 and 0.5; names are echoed as asked, in the order asked; mean was not asked."""
    prediction = answer(PLAIN, OUTPUT, quantiles=["0.30", "0.1", "0.9"], output_types=["quantiles"])
    assert prediction["quantiles"] == {"0.30": [9.0, 10.5], "0.1": [8.0, 10.0], "0.9": [12.0, 12.0]}
    assert list(prediction["quantiles"]) == ["0.30", "0.1", "0.9"]
    assert "mean" not in prediction


def test_mean_alone() -> None:
    """Only what was asked is answered."""
    assert answer(PLAIN, OUTPUT, output_types=["mean"]).keys() == {"start", "time_zone", "mean"}


def test_mean_weights() -> None:
    """They sum to one; one level is the mean itself; a uniform distribution on [0, 1] has the mean 1/2."""
    assert compute_mean_weights(np.array([0.4])).tolist() == [1.0]
    levels = np.array([0.05, 0.2, 0.5, 0.8, 0.95])
    assert compute_mean_weights(levels).sum() == pytest.approx(1)
    assert compute_mean_weights(levels) @ levels == pytest.approx(0.5)


def test_floor_and_cap_clip_every_output() -> None:
    """A market's price limits hold for quantiles and mean."""
    prediction = answer(replace(PLAIN, floor=9, cap=11), OUTPUT)
    assert prediction["quantiles"] == {"0.1": [9.0, 10.0], "0.5": [10.0, 11.0], "0.9": [11.0, 11.0]}
    assert prediction["mean"] == pytest.approx([10, 10.7])
    assert answer(replace(PLAIN, cap=11), OUTPUT)["quantiles"]["0.1"] == [8, 10]


def test_a_level_that_a_client_has_computed_is_the_trained_one() -> None:
    """A notebook asks for 1 - 0.9: within 1e-9 of an outer level it is that one; the answer repeats the name sent."""
    names = ["0.09999999999999998", "0.9000000000000001", "0.099999999"]
    prediction = answer(PLAIN, OUTPUT, quantiles=names, output_types=["quantiles"])
    assert list(prediction["quantiles"].values()) == [[8.0, 10.0], [12.0, 12.0], [8.0, 10.0]]
    assert list(prediction["quantiles"]) == names
    for text in ("0.0999999989", "0.9000000011"):
        with pytest.raises(RequestError, match="outside the trained range"):
            DeepAr(FORECAST).decode(body(INSTANCE, quantiles=[text]))


def test_samples_follow_the_quantiles() -> None:
    """Same seed, same draws; they lie within the trained range, with the mean of the quantile function."""
    clamped = replace(PLAIN, tail="clamp")
    asked = {"output_types": ["samples"], "num_samples": 4000}
    first, again = (answer(clamped, OUTPUT, seed=3, **asked)["samples"] for _ in range(2))
    assert first == again
    assert first != answer(clamped, OUTPUT, seed=4, **asked)["samples"]
    drawn = np.array(first)
    assert drawn.shape == (4000, 2)
    assert drawn.min(axis=0).tolist() == [8, 10]
    assert drawn.max(axis=0).tolist() == [12, 12]
    assert np.mean(drawn, axis=0) == pytest.approx([10, 11], abs=0.1)
    assert np.mean(drawn[:, 0] < 9) == pytest.approx(0.3, abs=0.03)


def test_instances_answer_in_their_order() -> None:
    """Each instance gets its own row, id and start."""
    series = [{"start": f"2024-01-0{day}", "target": [day] * 3, "item_id": day} for day in (1, 2, 3)]
    found, encode = DeepAr(replace(PLAIN, scaler=Scaler())).decode(body(*series))
    assert found[:, 0, 0].tolist() == [1, 2, 3]
    output = np.stack([np.full((2, 3), day, np.float32) for day in (1, 2, 3)])
    predictions = orjson.loads(encode(output))["predictions"]
    assert [each["item_id"] for each in predictions] == [1, 2, 3]
    assert [each["mean"] for each in predictions] == [[1, 1], [2, 2], [3, 3]]
    assert predictions[2]["start"] == "2024-01-03 03:00:00"


@pytest.mark.parametrize(
    ("change", "field", "message"),
    [
        ({"target": [1, 2, 3, 4]}, "target", r"4 steps, but the model needs 5 \(a context of 3 and lags of 2\)"),
        ({"target": [[1, 2], [3, 4]]}, "target", r"several products.*send \[T\]"),
        ({"target": [1, 2, "x", 3, 4]}, "target[2]", "expected a number, null or \"NaN\", not 'x'"),
        ({"target": 5}, "target", "expected a list, not a whole number"),
        ({"target": [1, 2, 3, 4, 1e300]}, "dynamic_feat[0]", "8 numbers, but target and prediction have 7"),
        ({"start": "yesterday"}, "start", "YYYY-MM-DD"),
        ({"start": "2024-02-30"}, "start", "YYYY-MM-DD"),
        ({"start": "2024-01-01Z"}, "start", "YYYY-MM-DD"),
        ({"start": "9999-12-31 20:00:00"}, "start", "9999"),
        ({"cat": []}, "cat", r"1 numbers \(zone\), not 0"),
        ({"cat": None}, "cat", "not 0"),
        ({"cat": [1, 2]}, "cat", "not 2"),
        ({"dynamic_feat": None}, "dynamic_feat", r"1 rows \(load\), not 0"),
        ({"dynamic_feat": [[1] * 7]}, "dynamic_feat[0]", "7 numbers, but target and prediction have 8"),
        ({"dynamic_feat": [[1] * 7 + [None]]}, "dynamic_feat[0][7]", "expected a number, not null"),
        ({"target": [1e300] * 6}, None, "not finite"),
    ],
)
def test_wrong_instances_are_refused_by_place(change: dict[str, Any], field: str | None, message: str) -> None:
    """The second instance is wrong: the error says which one, where in it, and what was needed."""
    with pytest.raises(RequestError, match=message) as caught:
        DeepAr(FORECAST).decode(body(INSTANCE, INSTANCE | change))
    assert (caught.value.instance, caught.value.field) == (1, field)


def test_covariates_nobody_asked_for_are_refused() -> None:
    """`cat` and `dynamic_feat` are required exactly when the archive says so."""
    for extra in ({"cat": [1]}, {"dynamic_feat": [[1] * 5]}):
        with pytest.raises(RequestError, match="needs 0"):
            DeepAr(PLAIN).decode(body({"start": "2024-01-01", "target": [1, 2, 3], **extra}))


@pytest.mark.parametrize(
    ("configuration", "field", "message"),
    [
        ({"quantiles": ["0.05"]}, "configuration.quantiles", "level 0.05 is outside the trained range 0.1 to 0.9"),
        ({"quantiles": ["nan"]}, "configuration.quantiles", "outside"),
        ({"quantiles": ["median"]}, "configuration.quantiles", "not a quantile level"),
        ({"output_types": ["samples"]}, "configuration.output_types", "`tail`"),
        ({"output_types": ["marginal"]}, "configuration.output_types", "`tail`"),
        ({"output_types": ["median"]}, "configuration.output_types[0]", "expected one of mean, quantiles"),
        ({"joint": True}, "configuration.joint", "several models"),
        ({"num_samples": 0}, "configuration.num_samples", "at least 1"),
        ({"sead": 1}, "configuration.sead", "did you mean seed"),
    ],
)
def test_wrong_configuration_is_refused_by_place(configuration: dict[str, Any], field: str, message: str) -> None:
    """What the archive cannot answer is refused before any work."""
    with pytest.raises(RequestError, match=message) as caught:
        DeepAr(FORECAST).decode(body(INSTANCE, **configuration))
    assert (caught.value.instance, caught.value.field) == (None, field)


def test_sizes_are_bounded() -> None:
    """Neither many instances nor many samples can take the worker's memory."""
    plain = {"start": "2024-01-01", "target": [1, 2, 3]}
    with pytest.raises(RequestError, match=str(MAX_ROWS)):
        DeepAr(PLAIN).decode(body(*[plain] * (MAX_ROWS + 1)))
    with pytest.raises(RequestError, match="at least 1"):
        DeepAr(PLAIN).decode(body())
    many = body(*[plain] * 500, output_types=["samples"], num_samples=10_000)
    with pytest.raises(RequestError, match="samples are more than"):
        DeepAr(replace(PLAIN, tail="clamp")).decode(many)


def test_failures_of_the_model_are_told_apart() -> None:
    """NaN out of the network, and prices beyond float32 when scaled back, are RunFailed, never a number."""
    wild = replace(PLAIN, scaler=Scaler(kind="asinh", scale=10))
    codec = FamilyCodec(Tensor(), wild)
    call = codec.decode(body({"start": "2024-01-01", "target": [1, 2, 3]}), "", "")
    for output in (np.full((1, 2, 3), 1e3, np.float32), np.full((1, 2, 3), np.nan, np.float32)):
        with pytest.raises(RunFailed):
            call.encode(output)


def test_a_forecast_is_json_only() -> None:
    """Quantiles and means are no single array."""
    with pytest.raises(UnsupportedMedia, match=NPY):
        FamilyCodec(Tensor(), FORECAST).decode(body(INSTANCE), "", NPY)


@given(
    st.sampled_from(["identity", "linear", "asinh"]),
    st.floats(-100, 100),
    st.floats(0.1, 100),
    st.lists(st.floats(-1000, 16_000), min_size=1),
)
def test_scalers_invert(kind: Any, center: float, scale: float, prices: list[float]) -> None:
    """Prices come back from network numbers, over the range a market has."""
    scaler = Scaler(kind=kind, center=center, scale=scale)
    values = np.array(prices)
    assert from_network(to_network(values, scaler), scaler) == pytest.approx(values, rel=1e-9, abs=1e-6)

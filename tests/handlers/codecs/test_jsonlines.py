"""JSON Lines: an instance a line, an answer a line, and no line stops another; no bytes break it."""

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from msgspec.structs import replace

from handlers.base import Float32
from handlers.codecs.codec import JSON, LINES, FamilyCodec, SingleCodec
from handlers.codecs.deepar_schema import MAX_ROWS
from handlers.errors import RequestError, UnsupportedMedia
from model_store.archives.manifest import InputChannel, Scaler
from tests.handlers.forecasters.test_deepar import FORECAST, INSTANCE, PLAIN

SAMPLED = replace(PLAIN, tail="clamp")
SEVERAL = replace(
    SAMPLED,
    products=("energy", "reserve"),
    scalers=(PLAIN.scaler, Scaler(kind="asinh")),
    scaler=Scaler(),
    inputs=(InputChannel(source="target"), InputChannel(source="target", product=1)),
)


class Shapes:
    """What a network of `PLAIN` says of itself."""

    input_name, input_shape, output_shape = "x", (1, 3), (2, 3)


def codec(forecast: Any = SAMPLED) -> FamilyCodec:
    """The codec of a forecaster of one channel."""
    return FamilyCodec(Shapes(), forecast)


def outputs(rows: Float32) -> Float32:
    """Network quantiles [n, 2, 3] that differ from row to row."""
    return np.ascontiguousarray(rows[:, 0, :2, None] + np.array([0, 1, 2], np.float32))


def answered(*lines: object, media: str = LINES) -> list[Any]:
    """The answers to these lines, each given as text or as what is to be written."""
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    call = codec().decode("\n".join(texts).encode(), media, "")
    body, content_type = call.encode(outputs(call.rows))
    assert content_type == LINES
    assert body.endswith(b"\n")
    return [json.loads(line) for line in body.splitlines()]


def plain(*target: object, **more: Any) -> dict[str, Any]:
    """An instance."""
    return {"start": "2024-01-01", "target": target, **more}


def test_each_line_is_answered_as_if_it_were_alone() -> None:
    """In order, with the numbers of a request of its own."""
    lines = [plain(1, 2, 3, item_id="a"), plain(30, 20, 10), plain(5, 5, 5, 5, 5)]
    found = answered(*lines)
    for line, answer in zip(lines, found, strict=True):
        call = codec().decode(json.dumps({"instances": [line]}).encode(), JSON, "")
        body, _ = call.encode(outputs(call.rows))
        assert [answer] == json.loads(body)["predictions"]
    assert found[0]["item_id"] == "a"


def test_a_bad_line_stops_nobody() -> None:
    """Its answer is an error that says what and where; the lines around it are answered."""
    good = plain(1, 2, 3)
    found = answered(good, "no json", "", plain(1, 2), plain(1, 2, "x"), [1], good)
    assert found[0] == found[6]
    errors = [answer["error"] for answer in found[1:6]]
    assert {error["code"] for error in errors} == {"bad_request"}
    assert errors[0]["message"].startswith("the body is not valid JSON")
    assert (errors[2]["field"], errors[3]["field"]) == ("target", "target[2]")
    assert answered("x", "y")[1]["error"]["code"] == "bad_request"  # nothing is left for the network


def test_a_line_may_say_what_it_wants() -> None:
    """A configuration of its own for each line, and an error where it is wrong; without one, what the archive has."""
    wishes: list[dict[str, Any]] = [{"output_types": ["mean"]}, {"quantiles": ["0.3"]}, {"quantiles": ["0.99"]}]
    found = answered(plain(1, 2, 3), *(plain(1, 2, 3, configuration=wish) for wish in wishes))
    assert set(found[0]) == {"start", "time_zone", "mean", "quantiles"}
    assert set(found[1]) == {"start", "time_zone", "mean"}
    assert list(found[2]["quantiles"]) == ["0.3"]
    assert found[3]["error"]["field"] == "configuration.quantiles"


def test_the_same_seed_draws_the_same_on_any_line() -> None:
    """What a line draws does not depend on its neighbours."""
    wish = {"output_types": ["samples"], "num_samples": 5, "seed": 7}
    alone = answered(plain(1, 2, 3, configuration=wish))
    among = answered(plain(9, 9, 9), plain(1, 2, 3, configuration=wish), plain(8, 8, 8, configuration=wish))
    assert among[1] == alone[0]


def test_outputs_that_are_not_finite_cost_their_line() -> None:
    """The model fails for one line, the others keep their answers."""
    call = codec().decode("\n".join(json.dumps(plain(1, 2, 3)) for _ in range(3)).encode(), LINES, "")
    broken = outputs(call.rows)
    broken[1, 0, 0] = np.nan
    first, failed, last = (json.loads(line) for line in call.encode(broken)[0].splitlines())
    assert first == last
    assert failed["error"]["code"] == "model_failed"


def test_lines_are_for_forecasts() -> None:
    """Tensors, npy answers, no line and too many lines are refused as a whole."""
    line = json.dumps(plain(1, 2, 3)).encode()
    with pytest.raises(RequestError, match="answers tensors only"):
        FamilyCodec(Shapes()).decode(line, LINES, "")
    with pytest.raises(UnsupportedMedia):
        codec().decode(line, LINES, JSON)
    with pytest.raises(UnsupportedMedia):
        SingleCodec({"x": (3,)}, {"y": (3,)}).decode(line, LINES, "")
    for body in (b"", b"\n", b"\n".join([line] * (MAX_ROWS + 1))):
        with pytest.raises(RequestError, match=f"1 to {MAX_ROWS} lines"):
            codec().decode(body, LINES, "")
    assert len(codec().decode(b"\n".join([line] * MAX_ROWS) + b"\n", LINES, "").rows) == MAX_ROWS


# --- nothing but a refusal, and nothing but sorted finite numbers ---------------------------------------------------

NUMBERS = st.floats(allow_nan=False) | st.integers() | st.none() | st.just("NaN") | st.just(1e308) | st.just(-1e308)
LEVELS = st.floats(0, 1).map(str) | st.text(max_size=5) | st.sampled_from(["0.1", "0.5", "0.9", "nan", "1e-1"])
CONFIGURATIONS = st.fixed_dictionaries(
    {},
    optional={
        "output_types": st.lists(st.sampled_from(["mean", "quantiles", "samples", "x"]), max_size=3),
        "quantiles": st.lists(LEVELS, max_size=4) | st.none(),
        "num_samples": st.integers(-1, 50) | st.text(max_size=3),
        "seed": st.integers(-1, 2**60) | st.none(),
    },
)
INSTANCES = st.fixed_dictionaries(
    {},
    optional={
        "start": st.sampled_from(
            [
                "2024-01-01",
                "2024-01-01 00:00:00",
                "9999-12-31",
                "0001-01-01",
                "x",
                "2024-03-30 23:00:00+00:00",
                "9999-12-31 23:00:00Z",
                "0001-01-01 00:00:00+14:00",
                "2024-10-27T00:00+02:00",
                "2024-01-01 00:00-23:59",
            ]
        )
        | st.text(),
        "target": st.lists(NUMBERS, max_size=8) | NUMBERS | st.lists(st.lists(NUMBERS, max_size=4), max_size=3),
        "dynamic_feat": st.lists(st.lists(NUMBERS, max_size=10), max_size=2),
        "cat": st.lists(st.integers(), max_size=2),
        "item_id": st.text() | st.integers() | st.floats(),
    },
)
ANYTHING = st.recursive(NUMBERS | st.text() | st.booleans(), lambda x: st.lists(x) | st.dictionaries(st.text(), x))


def check(body: bytes, media: str, forecast: Any) -> None:
    """The body is refused, or its answer is sorted and finite."""
    made = codec(forecast)
    try:
        call = made.decode(body, media, "")
    except RequestError:
        return
    assert np.isfinite(call.rows).all()
    levels = 3 * len(forecast.products)
    answer, _ = call.encode(np.sin(np.arange(len(call.rows) * 2 * levels, dtype=np.float32)).reshape(-1, 2, levels))
    if media == LINES:
        predictions = [json.loads(line) for line in answer.splitlines()]
    else:
        found = json.loads(answer)["predictions"]
        predictions = found if isinstance(found[0], dict) else []
    for prediction in predictions:
        named = {float(level): values for level, values in prediction.get("quantiles", {}).items()}
        rows = np.array([named[level] for level in sorted(named)])
        assert (np.diff(rows, axis=0) >= 0).all()
        for numbers in (rows, prediction.get("mean", ()), prediction.get("samples", ())):
            assert np.isfinite(np.array(numbers, np.float64)).all()


@pytest.mark.slow
@given(st.lists(INSTANCES, max_size=3), CONFIGURATIONS, st.sampled_from([SAMPLED, PLAIN, FORECAST, SEVERAL]))
@example([INSTANCE], {}, FORECAST)
@example([plain([1, 2, None], [1e300, 0, "NaN"])], {"output_types": ["mean", "quantiles", "samples"]}, SEVERAL)
@example([plain([1, 2, 3], [1, 2])], {}, SEVERAL)
def test_nearly_right_requests(instances: list[Any], configuration: dict[str, Any], forecast: Any) -> None:
    """Wrong lengths, huge numbers, odd stamps and levels: refused with a place, never anything else."""
    check(json.dumps({"instances": instances, "configuration": configuration}).encode(), JSON, forecast)
    lines = [json.dumps({**instance, "configuration": configuration}) for instance in instances]
    check("\n".join(lines).encode(), LINES, forecast)


@pytest.mark.slow
@given(
    st.binary(max_size=100) | ANYTHING.map(lambda value: json.dumps(value).encode()),
    st.sampled_from([JSON, LINES]),
    st.sampled_from([SAMPLED, SEVERAL]),
)
@example(b'{"instances":' + b"[" * 100_000, JSON, SAMPLED)
@example(b'{"a":' * 100_000, LINES, SAMPLED)
@example(b'{"start":"2024-01-01","target":' + b"[" * 100_000, LINES, SEVERAL)
@example(b'{"instances":[{"start":"2024-01-01","target":[1,2,\xff]}]}', JSON, SAMPLED)
def test_any_bytes(body: bytes, media: str, forecast: Any) -> None:
    """Deep nesting, broken text, any JSON."""
    check(body, media, forecast)


LEVEL = st.floats(0.1, 0.9)


@given(
    st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=3, max_size=3),
    st.lists(LEVEL, min_size=2, max_size=9, unique=True),
)
def test_interpolated_levels_are_sorted_to_the_last_bit(numbers: list[float], levels: list[float]) -> None:
    """However close levels and prices are, a higher level is never below a lower one, nor outside the trained ones."""
    wish = {"output_types": ["quantiles"], "quantiles": [repr(level) for level in levels]}
    call = codec(replace(SAMPLED, scaler=Scaler())).decode(
        json.dumps({"instances": [plain(1, 2, 3)], "configuration": wish}).encode(), JSON, ""
    )
    body, _ = call.encode(np.array([[numbers, numbers]], np.float32))
    found = json.loads(body)["predictions"][0]["quantiles"]
    values = np.array([found[repr(level)][0] for level in sorted(levels)], np.float32)
    assert (np.diff(values) >= 0).all()
    assert min(numbers) <= values[0]
    assert values[-1] <= max(numbers)

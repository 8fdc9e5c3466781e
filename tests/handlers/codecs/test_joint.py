"""The codec of a correlation archive turns marginals into joint scenarios and refuses any other body."""

import io
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from handlers.codecs import joint
from handlers.codecs.joint import JointCodec, JointModel
from handlers.codecs.scenarios import load_correlation
from handlers.errors import RequestError, UnsupportedMedia
from handlers.evaluation.correlation import estimate_gaussian

JSON, NPY = "application/json", "application/x-npy"
FOUND = estimate_gaussian(np.random.default_rng(0).standard_normal((60, 4, 5)), ("a", "b#x", "b#y", "c"))
CORRELATION = load_correlation(FOUND.record, FOUND.tensors)
CODEC, MODEL = JointCodec(CORRELATION), JointModel(CORRELATION)
LEVELS = [0.1, 0.5, 0.9]


def make_marginal(products: int = 0, steps: int = 5, base: float = 0.0) -> dict[str, Any]:
    """Quantiles that rise with the level; named products x, y, ... where there are several."""
    values = [[[base + d + t, base + d + t + 1, base + d + t + 4] for t in range(steps)] for d in range(products or 1)]
    return {"levels": LEVELS, "values": values, **({"products": list("xyz"[:products])} if products else {})}


def make_body(**fields: object) -> dict[str, Any]:
    """A request for a model of one product and one of two."""
    forecasts = [{"name": "a", "marginal": make_marginal()}, {"name": "b", "marginal": make_marginal(2, base=50)}]
    return {"forecasts": forecasts, "num_samples": 9, "seed": 3, **fields}


def answer(request: object, accept: str = "") -> tuple[bytes, str]:
    """Decoded, run and encoded, as a worker does."""
    call = CODEC.decode(json.dumps(request).encode(), JSON, accept)
    (found,) = MODEL.run_all([call.feeds])
    return call.encode(found)


def test_scenarios_of_one_product_and_of_several() -> None:
    """[S][T] and [S][D][T] in JSON, [S, N, T] as npy, the same numbers; every margin's middle sample is its median."""
    raw, media = answer(make_body())
    one, two = (np.array(each) for each in json.loads(raw)["samples"])
    assert (media, one.shape, two.shape) == (JSON, (9, 5), (9, 2, 5))
    raw, media = answer(make_body(), NPY)
    array = np.load(io.BytesIO(raw))
    assert (media, array.shape, array.dtype) == (NPY, (9, 3, 5), np.float32)
    np.testing.assert_array_equal(array, np.concatenate([one[:, None], two], axis=1).astype(np.float32))
    np.testing.assert_allclose(
        np.median(array, axis=0), [[t + 1 for t in range(5)]] + [[51 + d + t for t in range(5)] for d in range(2)]
    )


def test_sizes_say_where_the_samples_of_each_forecast_end() -> None:
    """In bytes, ahead of the samples; the rest of the answer is as it is without them."""
    plain, sized = answer(make_body())[0], answer(make_body(sizes=True))[0]
    sizes = json.loads(sized)["sizes"]
    assert sized[sized.index(b'"samples"') :] == plain[1:]
    at = len(b'{"samples":[')
    for size, samples in zip(sizes, json.loads(plain)["samples"], strict=True):
        assert json.loads(plain[at : at + size]) == samples
        at += size + 1
    assert plain[at - 1 :] == b"]}"


def test_a_product_that_is_named_twice_is_refused() -> None:
    """The message names the product, the error its second forecast: 10,000 of one took 46 s."""
    again = make_body()
    again["forecasts"].append({"name": "a", "marginal": make_marginal()})
    with pytest.raises(RequestError, match="a is named twice") as caught:
        answer(again)
    assert (caught.value.instance, caught.value.field) == (2, "configuration.joint")


def test_seeds() -> None:
    """The same seed gives the same bytes, none gives others each time."""
    assert answer(make_body()) == answer(make_body())
    assert answer(make_body(seed=4)) != answer(make_body())
    assert answer(make_body(seed=None)) != answer(make_body(seed=None))


def test_lengths_may_differ_in_json() -> None:
    """A shorter forecast has the leading block of what it would have at full length; one array cannot hold both."""
    forecasts = [{"name": "a", "marginal": make_marginal()}, {"name": "c", "marginal": make_marginal(steps=2)}]
    long, short = json.loads(answer(make_body(forecasts=forecasts))[0])["samples"]
    assert (np.array(long).shape, np.array(short).shape) == ((9, 5), (9, 2))
    with pytest.raises(RequestError, match="ask for JSON"):
        answer(make_body(forecasts=forecasts), NPY)


def start_at(name: str, start: str | None, steps: int = 5, step_s: int = 3600) -> dict[str, Any]:
    """A forecast of one product that says when it starts."""
    clock = {} if start is None else {"start": start, "step_s": step_s}
    return {"name": name, "marginal": {**make_marginal(steps=steps), **clock}}


def test_forecasts_are_paired_by_their_times() -> None:
    """What starts two hours later is correlated with the other's third hour; the zone of a stamp does not matter."""
    whole = [start_at("a", "2024-01-01 00:00:00+00:00"), start_at("c", "2024-01-01 01:00:00+01:00")]
    later = [start_at("a", "2024-01-01T00:00:00Z"), start_at("c", "2024-01-01 02:00:00+00:00", 3)]
    together = [np.array(each) for each in json.loads(answer(make_body(forecasts=whole))[0])["samples"]]
    paired = [np.array(each) for each in json.loads(answer(make_body(forecasts=later))[0])["samples"]]
    plain = [start_at("a", None), start_at("c", None)]
    assert answer(make_body(forecasts=whole)) == answer(make_body(forecasts=plain))
    np.testing.assert_array_equal(paired[0], together[0])
    ranks = [each.argsort(axis=0).argsort(axis=0) for each in (paired[1], together[1][:, 2:])]
    np.testing.assert_array_equal(ranks[0], ranks[1])  # the scores of those hours
    with pytest.raises(RequestError, match=r"a and c start at different times; .* ask for JSON"):
        answer(make_body(forecasts=later), NPY)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (start_at("c", "2024-01-02 00:00:00+00:00"),
         r"a from 2024-01-01 00:00:00\+00:00 \(5 steps\) ends before c from 2024-01-02 00:00:00\+00:00"),
        (start_at("c", "2023-12-31 19:00:00+00:00"), "c from 2023-12-31 19:.* ends before a from 2024-01-01 00:00"),
        (start_at("c", "2024-01-01 00:30:00+00:00"), "a from 2024-01-01 .* and c from .* no step at the same time"),
        (start_at("c", "2024-01-01 00:00:00+00:00", step_s=900), "a has steps of 3600 s, but c has steps of 900 s"),
        (start_at("c", "2024-01-01 02:00:00+00:00"), "c ends 7 steps after the earliest start, .* covers 5"),
        (start_at("c", None), "c has no start, but other forecasts have"),
        (start_at("c", "2024-01-01 00:00:00"), "expected a time with an offset"),
        (start_at("c", "noon"), "expected YYYY-MM-DD"),
    ],
)  # fmt: skip
def test_forecasts_that_do_not_meet_are_refused(other: dict[str, Any], message: str) -> None:
    """Both models and their starts are named; once they were paired by position, whatever their days."""
    with pytest.raises(RequestError, match=message):
        answer(make_body(forecasts=[start_at("a", "2024-01-01 00:00:00+00:00"), other]))


@pytest.mark.parametrize(
    ("change", "message", "instance"),
    [
        ({"forecasts": []}, "at least 1", None),
        ({"forecasts": [{"name": "a"}]}, "marginal", None),
        ({"num_samples": 0}, "num_samples", None),
        ({"num_samples": 1}, "at least 2", None),
        ({"seed": -1}, "seed", None),
        ({"unknown": 1}, "unknown", None),
        (
            {"forecasts": [{"name": "a", "marginal": make_marginal()}, {"name": "z", "marginal": make_marginal()}]},
            "'z'",
            1,
        ),
        (
            {"forecasts": [{"name": "b", "marginal": make_marginal(2)}, {"name": "z", "marginal": make_marginal()}]},
            "'z'",
            1,
        ),
        ({"forecasts": [{"name": "a", "marginal": make_marginal(steps=6)}]}, "6 steps", 0),
        ({"forecasts": [{"name": "b", "marginal": {**make_marginal(2), "products": ["x"]}}]}, "2 rows", 0),
        (
            {"forecasts": [{"name": "a", "marginal": {**make_marginal(), "levels": [0.5, 0.1, 0.9]}}]},
            "levels must rise",
            0,
        ),
        (
            {"forecasts": [{"name": "a", "marginal": {**make_marginal(), "levels": [0.1, 0.5, 1.0]}}]},
            "levels must rise",
            0,
        ),
        ({"forecasts": [{"name": "a", "marginal": {**make_marginal(), "levels": [0.5]}}]}, "must have 1 values", 0),
        ({"forecasts": [{"name": "a", "marginal": {"levels": [0.1, 0.5], "values": [[[2, 1]]]}}]}, "sorted", 0),
        ({"forecasts": [{"name": "a", "marginal": {"levels": [0.5], "values": [[[1e39]]]}}]}, "finite", 0),
        (
            {"forecasts": [{"name": "a", "marginal": {"levels": [0.1, 0.5], "values": [[[1, 2], [3, 4, 5], [6]]]}}]},
            "must have 2 values",
            0,
        ),
        (
            {"forecasts": [{"name": "b", "marginal": {**make_marginal(2), "values": [[[1, 2, 3]] * 3, [[1, 2, 3]]]}}]},
            "b#y has 1 steps and b#x 3",
            0,
        ),
        ({"forecasts": [{"name": "a", "marginal": {"levels": [0.5], "values": [[]]}}]}, "at least 1", None),
    ],
)
def test_wrong_requests_say_what_and_where(change: dict[str, Any], message: str, instance: int | None) -> None:
    """Each fault is a RequestError with its place among the forecasts."""
    with pytest.raises(RequestError) as caught:
        answer(make_body(**change))
    assert message in caught.value.message
    assert caught.value.instance == instance


@pytest.mark.parametrize(("content_type", "accept"), [(NPY, ""), (JSON, "application/jsonlines"), ("text/csv", "")])
def test_other_media_are_refused(content_type: str, accept: str) -> None:
    """Marginals are JSON."""
    with pytest.raises(UnsupportedMedia):
        CODEC.decode(json.dumps(make_body()).encode(), content_type, accept)


@pytest.mark.parametrize("indent", [None, 1])
def test_plain_values_are_read_as_careful_ones(indent: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the same bits, whatever lies between the numbers and however they are written."""
    request = make_body()
    request["forecasts"][0]["marginal"]["values"] = [[[-1.5e-300, 0.1, 7], [-3, 1 / 3, 2.0000000000000004]] * 2]
    body = json.dumps(request, indent=indent).encode()
    quick = CODEC.decode(body, JSON, "").feeds
    monkeypatch.setattr(joint, "_read_plain", lambda _: None)
    careful = CODEC.decode(body, JSON, "").feeds
    for one, other in zip(quick.marginals, careful.marginals, strict=True):
        assert one.name == other.name
        np.testing.assert_array_equal(one.values, other.values, strict=True)


SCRAPS = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.sampled_from(["a", "b", "x", "NaN"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["levels", "values", "name"]), inner),
    max_leaves=12,
)


@pytest.mark.slow
@given(
    st.binary(max_size=60)
    | st.fixed_dictionaries(
        {},
        optional={
            "forecasts": SCRAPS
            | st.lists(
                st.fixed_dictionaries({"name": SCRAPS, "marginal": SCRAPS | st.just(make_marginal())}), max_size=3
            ),
            "num_samples": SCRAPS | st.just(5),
            "seed": SCRAPS,
        },
    ).map(lambda value: json.dumps(value).encode())
)
def test_no_body_breaks_it(raw: bytes) -> None:
    """Arbitrary bytes and near misses are answered or refused."""
    try:
        call = CODEC.decode(raw, JSON, "")
    except RequestError:
        return
    (found,) = MODEL.run_all([call.feeds])
    assert json.loads(call.encode(found)[0])["samples"]

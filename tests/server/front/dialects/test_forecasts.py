"""Bodies sliced and answers spliced: every byte of an item arrives, every fault names its place."""

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.errors import Refused, Situation
from server.front.dialects.forecasts import (
    MAX_ITEMS,
    Item,
    Prediction,
    misplaced,
    prediction,
    require_all,
    sampled,
    sliced,
    spliced,
    statuses,
    story,
    together,
)
from server.ipc import frames as wire

LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
VALUES = st.recursive(LEAVES, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=20)


def response(cache: wire.CacheResult = wire.CacheResult.HIT, **times: int) -> wire.Response:
    """A worker's good answer."""
    took: dict[str, Any] = {"queue_us": 0, "load_us": 0, "inference_us": 0, **times}
    return wire.Response(1, 0, cache, wire.Tier.DISK, "v", "application/json", **took, body_bytes=0, body=b"")


@pytest.mark.slow
@given(st.lists(st.dictionaries(st.text(), VALUES), min_size=1, max_size=8), st.dictionaries(st.text(), VALUES))
def test_an_item_is_the_one_instance_of_its_request(items: list[dict[str, Any]], configuration: dict[str, Any]) -> None:
    """Whatever fields it has, in whatever spelling: the model's request holds the very item and configuration."""
    configuration.pop("joint", None)
    asked = [{**item, "target_model": f"m{i}.mar"} for i, item in enumerate(items)]
    body = json.dumps({"requests": asked, "configuration": configuration}, indent=1).encode()
    found = sliced(body)
    assert found.joint is None
    for i, (item, each) in enumerate(zip(asked, found.items, strict=True)):
        assert isinstance(each, Item)
        assert each.model == f"m{i}.mar"
        assert json.loads(each.body) == {"instances": [item], "configuration": configuration}


@given(st.binary(max_size=200) | VALUES.map(lambda value: json.dumps(value).encode()))
def test_no_body_breaks_the_slicing(body: bytes) -> None:
    """Arbitrary bytes and arbitrary JSON are sliced or refused as a bad request."""
    situation = None
    try:
        assert sliced(body).items
    except Refused as refused:
        situation = refused.situation
    assert situation in (None, Situation.BAD_REQUEST)


@pytest.mark.parametrize(
    ("body", "message", "field"),
    [
        (b"", "not a call for forecasts: Input data was truncated", None),
        (b"[]", "not a call for forecasts: Expected `object`, got `array`", None),
        (b"{}", "missing required field `requests`", None),
        (b'{"requests": 3}', "Expected `array`, got `int` - at `$.requests`", None),
        (b'{"requests": []}', f"a call has 1 to {MAX_ITEMS} requests, not 0", "requests"),
        (
            b'{"requests": [' + b"{}," * MAX_ITEMS + b"{}]}",
            f"1 to {MAX_ITEMS} requests, not {MAX_ITEMS + 1}",
            "requests",
        ),
        (b'{"requests": [{}], "configuration": 1}', "Expected `object`, got `int`", None),
        (b'{"requests": [{}], "configuration": {"joint": 1}}', "Expected `bool`, got `int` - at `$.joint`", None),
        (b'{"requests": ' + b"[" * 100_000, "not a call for forecasts", None),
        (b'{"requests": [{}]} x', "trailing characters", None),
    ],
)
def test_a_body_that_is_no_call(body: bytes, message: str, field: str | None) -> None:
    """The whole call is refused, with what was wrong and where."""
    with pytest.raises(Refused) as caught:
        sliced(body)
    assert message in str(caught.value)
    assert caught.value.detail.field == field


@pytest.mark.parametrize(
    ("item", "situation", "message"),
    [
        ({}, Situation.BAD_REQUEST, "missing required field `target_model`"),
        (3, Situation.BAD_REQUEST, "Expected `object`, got `int`"),
        ({"target_model": 3}, Situation.BAD_REQUEST, "Expected `str`, got `int`"),
        ({"target_model": "../x"}, Situation.BAD_NAME, ".."),
        ({"target_model": ""}, Situation.BAD_NAME, ""),
    ],
)
def test_a_bad_item_is_refused_alone(item: object, situation: Situation, message: str) -> None:
    """Its neighbours go on; its error names the field."""
    good = {"target_model": "au/m.mar"}
    first, bad, last = sliced(json.dumps({"requests": [good, item, good]}).encode()).items
    assert isinstance(first, Item)
    assert isinstance(last, Item)
    assert isinstance(bad, Refused)
    assert (bad.situation, bad.detail.field) == (situation, "target_model")
    assert message in str(bad)


def test_the_answer_in_order() -> None:
    """Predictions as they came, errors in their places, the number of failures, a status for each item's count."""
    raw = prediction(b'{"predictions":[ {"mean": [1.50, 2e0]} ]}')
    assert raw == b'{"mean": [1.50, 2e0]}'
    refused = Refused(Situation.NOT_FOUND, "no archive", field="target_model")
    found: list[Prediction | Refused] = [Prediction(raw, response()), refused, Prediction(raw, response())]
    answer = json.loads(spliced(found))
    error = {"code": "not_found", "message": "no archive", "field": "target_model"}
    assert answer == {"predictions": [{"mean": [1.5, 2]}, {"error": error}, {"mean": [1.5, 2]}], "failed": 1}
    assert b'{"mean": [1.50, 2e0]}' in spliced(found)
    assert statuses(found) == [200, 400, 200]


@pytest.mark.parametrize(
    "answer", [b"{}", b'{"predictions":[]}', b'{"predictions":[1,2]}', b'{"predictions":{"y":[1]}}']
)
def test_an_answer_that_is_no_forecast(answer: bytes) -> None:
    """A model that answers something else fails alone."""
    with pytest.raises(Refused, match="not a forecast"):
        prediction(answer)


def test_what_the_headers_tell() -> None:
    """How often the cache had the model, and the longest time of each kind."""
    found: list[Prediction | Refused] = [
        Prediction(b"1", response(queue_us=1500, inference_us=10)),
        Prediction(b"1", response(wire.CacheResult.MISS, load_us=2000, inference_us=20)),
        Prediction(b"1", response()),
        Refused(Situation.NOT_FOUND, "no"),
    ]
    assert dict(story(found)) == {
        b"server-timing": b"queue;dur=1.500, load;dur=2.000, inference;dur=0.020",
        b"x-fleetcast-cache": b"hit=2, miss=1",
    }
    assert msgspec.json.decode(spliced(found))["failed"] == 1


def joint_call(**configuration: object) -> bytes:
    """A call of two models for joint scenarios."""
    requests = [{"target_model": "a.mar", "target": [1]}, {"target_model": "b.mar", "target": [2]}]
    return json.dumps({"requests": requests, "configuration": {"joint": True, **configuration}}).encode()


def test_a_joint_call_asks_the_models_for_marginals() -> None:
    """What is drawn is the correlation's to hear, the rest the models'."""
    call = joint_call(
        correlation="j.mar", num_samples=7, seed=3, output_types=["samples", "mean", "quantiles"], quantiles=["0.5"]
    )
    found = sliced(call)
    assert found.joint is not None
    assert found.joint.correlation == "j.mar"
    item = found.items[1]
    assert isinstance(item, Item)
    assert json.loads(item.body) == {
        "instances": [{"target_model": "b.mar", "target": [2]}],
        "configuration": {"output_types": ["mean", "quantiles", "marginal"], "quantiles": ["0.5"]},
    }
    answers: list[Prediction | Refused] = [
        Prediction(b'{"mean":[1.50],"marginal":{"levels":[0.5],"values":[[[1]]]}}', response()),
        Refused(Situation.NOT_FOUND, "no"),
    ]
    asked = json.loads(together(found.joint, found.items, answers))
    marginal = {"levels": [0.5], "values": [[[1]]]}
    assert asked == {"forecasts": [{"name": "a.mar", "marginal": marginal}], "num_samples": 7, "seed": 3}
    first, second = sampled(answers, b'{"samples":[[[1.25],[2.50]]]}')
    assert isinstance(first, Prediction)
    assert first.body == b'{"mean":[1.50],"samples":[[1.25],[2.50]]}'
    assert second is answers[1]


@pytest.mark.parametrize(
    ("configuration", "situation", "field"),
    [
        ({}, Situation.BAD_REQUEST, "configuration.correlation"),
        ({"correlation": "../j.mar"}, Situation.BAD_NAME, "configuration.correlation"),
        ({"correlation": 3}, Situation.BAD_REQUEST, None),
        ({"correlation": "j.mar", "output_types": ["mean"]}, Situation.BAD_REQUEST, "configuration.output_types"),
        ({"correlation": "j.mar", "output_types": "samples"}, Situation.BAD_REQUEST, None),
    ],
)
def test_a_joint_call_that_cannot_be(configuration: dict[str, object], situation: Situation, field: str | None) -> None:
    """No correlation named, a bad name, nothing to draw: refused before any model is asked."""
    with pytest.raises(Refused) as caught:
        sliced(joint_call(**configuration))
    assert (caught.value.situation, caught.value.detail.field) == (situation, field)


def test_places_in_a_joint_call_are_those_of_its_requests() -> None:
    """The correlation counts the forecasts it got; the client counts its requests."""
    found: list[Prediction | Refused] = [
        Refused(Situation.NOT_FOUND, "no"),
        Prediction(b"{}", response()),
        Prediction(b"{}", response()),
    ]
    placed = misplaced(found, Refused(Situation.BAD_REQUEST, "unknown", 1, "configuration.joint"))
    assert placed.detail.instance == 2
    with pytest.raises(Refused) as caught:
        require_all(found)
    assert (caught.value.detail.instance, caught.value.situation) == (0, Situation.NOT_FOUND)
    require_all(found[1:])


def test_a_model_without_marginal_fails_alone() -> None:
    """Joint scenarios are made of marginals."""
    with pytest.raises(Refused, match="no marginal"):
        prediction(b'{"predictions":[{"mean":[1]}]}', marginal=True)
    assert prediction(b'{"predictions":[{"marginal":{}}]}', marginal=True) == b'{"marginal":{}}'

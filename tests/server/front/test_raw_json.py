"""DeepAR JSON cut and joined: numbers stay as they were written."""

import json

import msgspec
import pytest

from server.errors import Refused
from server.front.raw_json import (
    build_correlation_request,
    build_request,
    extract_prediction,
    replace_marginal,
    split_samples,
)
from server.front.slices import finish_slices


def test_a_request_is_its_parts() -> None:
    """The instance's bytes and the configuration's, as they are."""
    assert build_request(msgspec.Raw(b'{"a": 1.50}'), b'{"b":2e0}') == (
        b'{"instances":[{"a": 1.50}],"configuration":{"b":2e0}}'
    )


def test_a_prediction_is_cut_out() -> None:
    """As it was written, digits and spaces too."""
    assert finish_slices(extract_prediction(b'{"predictions":[ {"mean": [1.50, 2e0]} ]}')) == b'{"mean": [1.50, 2e0]}'


@pytest.mark.parametrize(
    "answer", [b"{}", b'{"predictions":[]}', b'{"predictions":[1,2]}', b'{"predictions":{"y":[1]}}']
)
def test_an_answer_that_is_no_forecast(answer: bytes) -> None:
    """A model that answers something else is refused."""
    with pytest.raises(Refused, match="not a forecast"):
        finish_slices(extract_prediction(answer))


def test_joint_scenarios_need_marginals() -> None:
    """A prediction without one is refused."""
    with pytest.raises(Refused, match="no marginal"):
        finish_slices(extract_prediction(b'{"predictions":[{"mean":[1]}]}', marginal=True))
    assert finish_slices(extract_prediction(b'{"predictions":[{"marginal":{}}]}', marginal=True)) == b'{"marginal":{}}'


def test_marginals_become_samples() -> None:
    """The correlation gets names and marginals; its samples take their place, all other fields stay."""
    prediction = b'{"mean":[1.50],"marginal":{"levels":[0.5],"values":[[[1]]]}}'
    asked = finish_slices(build_correlation_request([("a.mar", prediction)], {"seed": msgspec.Raw(b"3")}))
    marginal = {"levels": [0.5], "values": [[[1]]]}
    assert json.loads(asked) == {"forecasts": [{"name": "a.mar", "marginal": marginal}], "seed": 3}
    (samples,) = finish_slices(split_samples(b'{"samples":[[[1.25],[2.50]]]}'))
    assert finish_slices(replace_marginal(prediction, samples)) == b'{"mean":[1.50],"samples":[[1.25],[2.50]]}'

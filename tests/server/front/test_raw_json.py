"""DeepAR JSON cut and joined: numbers stay as they were written."""

import json

import msgspec
import pytest

from server.errors import Refused
from server.front.raw_json import (
    build_correlation_request,
    build_request,
    cut_prediction,
    extract_prediction,
    replace_marginal,
    split_samples,
)
from server.front.slices import AT_ONCE, finish_slices


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
    with pytest.raises(Refused, match="not a forecast"):
        finish_slices(cut_prediction(answer))


def test_joint_scenarios_need_marginals() -> None:
    """A prediction without one is refused."""
    with pytest.raises(Refused, match="no marginal"):
        finish_slices(cut_prediction(b'{"predictions":[{"mean":[1]}]}'))
    for size in (1, AT_ONCE):
        answer = b'{"predictions":[{"a":"%b", "marginal": {}}]}' % (b"x" * size)
        fields = finish_slices(cut_prediction(answer))
        assert {name: bytes(value) for name, value in fields.items()} == {
            "a": b'"%b"' % (b"x" * size),
            "marginal": b"{}",
        }


def test_marginals_become_samples() -> None:
    """The correlation gets names and marginals; its samples take their place, all other fields stay."""
    prediction = b'{"mean":[1.50],"marginal":{"levels":[0.5],"values":[[[1]]]}}'
    fields = finish_slices(cut_prediction(b'{"predictions":[%b]}' % prediction))
    asked = finish_slices(build_correlation_request([("a.mar", fields)], {"seed": msgspec.Raw(b"3")}))
    marginal = {"levels": [0.5], "values": [[[1]]]}
    assert json.loads(asked) == {
        "forecasts": [{"name": "a.mar", "marginal": marginal}],
        "seed": 3,
        "sizes": True,
    }
    (samples,) = finish_slices(split_samples(b'{"samples":[[[1.25],[2.50]]]}'))
    assert b"".join(replace_marginal(fields, samples)) == b'{"mean":[1.50],"samples":[[1.25],[2.50]]}'


PIECES = [b"[[1.25],[2.50]]", b"[[[3]]]", b"[]"]


def test_samples_are_cut_at_their_sizes() -> None:
    """As they are cut where nothing says how long they are; what lies in them is not read."""
    plain = b'{"samples":[%b]}' % b",".join(PIECES)
    sized = b'{"sizes":[%b],' % b",".join(b"%d" % len(each) for each in PIECES) + plain[1:]
    for text in (plain, sized):
        assert [bytes(each) for each in finish_slices(split_samples(text))] == PIECES


@pytest.mark.parametrize("sizes", [[15, 7], [15, 7, 3], [14, 8, 2], [0, 23, 2], [25], [99, 7, 2], [], [15, 7, 2, 2]])
def test_sizes_that_are_not_those_of_the_samples_are_left_aside(sizes: list[int]) -> None:
    """Then the text itself says where its values end."""
    text = b'{"sizes":%b,"samples":[%b]}' % (msgspec.json.encode(sizes), b",".join(PIECES))
    assert [bytes(each) for each in finish_slices(split_samples(text))] == PIECES

"""Keys that look like known ones are refused; others are nobody's business."""

import pytest

from server.errors import Refused
from server.front.forecasting.misspelt_keys import MOST_KEYS, cut_keys, refuse_misspelt

KNOWN = ("quantiles", "horizon", "level", "data")


@pytest.mark.parametrize(("key", "meant"), [("quantile", "quantiles"), ("Horizon", "horizon"), ("levels", "level")])
def test_a_misspelt_key_is_named_with_the_one_that_is_meant(key: str, meant: str) -> None:
    """And with its place."""
    with pytest.raises(Refused, match=f"did you mean {meant}") as caught:
        refuse_misspelt(["horizon", key], KNOWN, "options.")
    assert caught.value.detail.field == f"options.{key}"


def test_other_keys_are_let_through() -> None:
    """Known ones, quite different ones, and those that are too many or too long to be compared."""
    refuse_misspelt([*KNOWN, "metadata", "q", "x" * 10_000, "quantiles" * 5], KNOWN)
    refuse_misspelt([*(f"{i:05}" for i in range(MOST_KEYS)), "quantile"], KNOWN)


def test_only_an_object_has_keys() -> None:
    """Of anything else there are none, and it raises nothing."""
    assert list(cut_keys(b'{"a": {"b": 1}, "c": [1]}')) == ["a", "c"]
    for body in (b"[1]", b"{", b"\xff", b"[" * 100_000):
        assert cut_keys(body) == {}

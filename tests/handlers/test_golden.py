"""Golden comparison: the first difference is found and named, tolerances are those of the sample."""

from typing import Any

import pytest

from handlers.golden import find_mismatch

EXPECTED: dict[str, Any] = {"predictions": [{"mean": [1.0, 100], "item_id": "a", "ok": True, "none": None}]}


def change_expected(**fields: Any) -> dict[str, Any]:
    """EXPECTED with other fields in its prediction."""
    return {"predictions": [EXPECTED["predictions"][0] | fields]}


@pytest.mark.parametrize("actual", [EXPECTED, change_expected(mean=[1.0009, 100.09]), change_expected(mean=[1, 99.91])])
def test_within_tolerance(actual: object) -> None:
    """Numbers may differ by abs + rel * |expected|, and 1 is 1.0."""
    assert find_mismatch(EXPECTED, actual, 1e-4, 1e-3) is None


@pytest.mark.parametrize(
    ("actual", "message"),
    [
        (change_expected(mean=[1.0, 100.2]), "predictions[0].mean[1]: expected 100, got 100.2"),
        (change_expected(mean=[float("nan"), 100]), "predictions[0].mean[0]: expected 1.0, got nan"),
        (change_expected(mean=[True, 100]), "predictions[0].mean[0]: expected 1.0, got True"),
        (change_expected(mean=[1.0]), "predictions[0].mean: expected 2 items, got 1"),
        (change_expected(mean=5), "predictions[0].mean: expected [1.0, 100], got 5"),
        (change_expected(ok=1), "predictions[0].ok: expected True, got 1"),
        (change_expected(item_id="b"), "predictions[0].item_id: expected 'a', got 'b'"),
        (change_expected(none=0), "predictions[0].none: expected None, got 0"),
        ({"predictions": []}, "predictions: expected 1 items, got 0"),
        ({}, "the answer: expected the keys ['predictions'], got []"),
        ([], "the answer: expected {'predictions':"),
    ],
)
def test_the_first_difference_is_named(actual: object, message: str) -> None:
    """The path leads to the value, and both values are shown."""
    found = find_mismatch(EXPECTED, actual, 1e-4, 1e-3)
    assert found is not None
    assert found.startswith(message)
    assert len(found) < 250

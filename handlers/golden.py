"""Compares an answer with the one that a golden sample expects, and names the first difference. Pure."""

from textwrap import shorten

#: Keys of today's answers that older golden samples do not have.
ADDED = {"time_zone", "warnings", "quality", "fallback"}
SHOWN = 80  #: most characters of a value in a message


def find_mismatch(expected: object, actual: object, abs_tolerance: float, rel_tolerance: float) -> str | None:
    """Return the first difference between two JSON values, such as `predictions[0]: expected 1.25, got 1.31`, or None.

    Numbers may differ by `abs_tolerance + rel_tolerance * |expected|`; everything else must be equal, with the same
    keys and lengths; a key in ADDED may be new.
    """
    return _find_mismatch(expected, actual, abs_tolerance, rel_tolerance, "")


def _find_mismatch(
    expected: object, actual: object, abs_tolerance: float, rel_tolerance: float, path: str
) -> str | None:
    where = path or "the answer"
    if isinstance(expected, dict) and isinstance(actual, dict):
        if expected.keys() != actual.keys() - (ADDED - expected.keys()):
            return f"{where}: expected the keys {sorted(expected)}, got {sorted(actual)}"
        inner = [(f"{path}.{key}" if path else str(key), expected[key], actual[key]) for key in expected]
    elif isinstance(expected, list) and isinstance(actual, list):
        if len(expected) != len(actual):
            return f"{where}: expected {len(expected)} items, got {len(actual)}"
        inner = [(f"{path}[{i}]", e, a) for i, (e, a) in enumerate(zip(expected, actual, strict=True))]
    else:
        same = _is_close(expected, actual, abs_tolerance, rel_tolerance)
        return None if same else f"{where}: expected {_format_value(expected)}, got {_format_value(actual)}"
    found = (_find_mismatch(e, a, abs_tolerance, rel_tolerance, place) for place, e, a in inner)
    return next((text for text in found if text is not None), None)


def _is_close(expected: object, actual: object, abs_tolerance: float, rel_tolerance: float) -> bool:
    if _is_number(expected) and _is_number(actual):
        assert isinstance(expected, int | float)
        assert isinstance(actual, int | float)
        # in this form NaN is close to no number
        return abs(expected - actual) <= abs_tolerance + rel_tolerance * abs(expected)
    return type(expected) is type(actual) and expected == actual


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _format_value(value: object) -> str:
    return shorten(repr(value), SHOWN, placeholder="...")

"""What is wrong with a JSON document, in our words. Pure.

What msgspec and orjson say of it names their own types and stands in no manual of ours; clients see these texts.
"""

import json
import re
from typing import NamedTuple

import msgspec

NO_KEY = "there is no such key"
NO_CHOICE = " is not one of the values it may have"
SHOWN = 40  #: most characters of a document in a message
_PLACE = re.compile(r"(.*) - at `(?:key in )?\$\.?(.*)`", re.DOTALL)
_TYPE = re.compile(r"Expected `([^`]+)`, got `([^`]+)`")
_BOUND = re.compile(r"Expected `(\w+)` (of length )?(<=|>=|<|>) (\S+)")
_LENGTH = re.compile(r"Expected `array` of length (\d+)(?:, got (\d+))?")
_PATTERN = re.compile(r"Expected `str` (?:matching|that matches) regex (.*)", re.DOTALL)
_MISSING = re.compile(r"Object missing required field `([^`]*)`")
_UNKNOWN = re.compile(r"Object contains unknown field `([^`]*)`", re.DOTALL)
_CHOICE = re.compile(r"Invalid (?:enum value|value) (.*)", re.DOTALL)
_BYTE = re.compile(r"\(byte (\d+)\)")
_TYPES = {
    "str": "text",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "null": "null",
    "array": "a list",
    "object": "an object",
}
_GOT = {"float": "a fraction"}  # a whole number is expected, or text
_BOUNDS = {"<=": "at most", ">=": "at least", "<": "less than", ">": "more than"}
FAULTS = (msgspec.MsgspecError, json.JSONDecodeError, UnicodeDecodeError, RecursionError)


class JsonFault(NamedTuple):
    """What is wrong and where: `place` is a path such as `instances[3].start`, empty for the whole document."""

    message: str
    place: str = ""

    def __str__(self) -> str:
        return f"{self.place}: {self.message}" if self.place else self.message


def explain_fault(error: Exception) -> JsonFault:
    """Word one of FAULTS. A key that is missing or unknown is part of the place."""
    if isinstance(error, RecursionError):
        return JsonFault("it is nested too deeply")
    if isinstance(error, UnicodeDecodeError):
        return JsonFault(f"it is not UTF-8 at byte {error.start}")
    if isinstance(error, json.JSONDecodeError):  # orjson's errors are of this class
        if "UTF-8" in error.msg:
            return JsonFault("it is not UTF-8")
        return JsonFault(f"it is not JSON at character {error.pos}" if error.doc else "it is empty, not JSON")
    text = str(error)
    if not isinstance(error, msgspec.ValidationError):
        return JsonFault(_explain_syntax(text))
    found = _PLACE.fullmatch(text)
    message, place = found.groups() if found else (text, "")
    return _explain_value(message, place)


def _explain_syntax(text: str) -> str:
    """Say where a text stops being JSON."""
    if "truncated" in text:
        return "it ends before its JSON does"
    if "UTF-8" in text:
        return "it is not UTF-8"
    found = _BYTE.search(text)
    return f"it is not JSON at byte {found[1]}" if found else "it is not JSON"


def _explain_value(message: str, place: str) -> JsonFault:
    """Say what a value is not."""
    if found := _TYPE.fullmatch(message):
        return JsonFault(f"expected {_name_types(found[1])}, not {_GOT.get(found[2]) or _name_types(found[2])}", place)
    if found := _LENGTH.fullmatch(message):
        other = f", not of {found[2]}" if found[2] else ""
        return JsonFault(f"expected a list of {found[1]}{other}", place)
    if found := _BOUND.fullmatch(message):
        what = _TYPES.get(found[1], found[1])
        counted = {"str": " characters", "array": " values"}.get(found[1], "") if found[2] else ""
        return JsonFault(f"expected {what} of {_BOUNDS[found[3]]} {found[4]}{counted}", place)
    if found := _PATTERN.fullmatch(message):
        return JsonFault(f"expected text of the form {found[1]}", place)
    if found := _MISSING.fullmatch(message):
        return JsonFault("it is missing", _join(place, found[1]))
    if found := _UNKNOWN.fullmatch(message):
        return JsonFault(NO_KEY, _join(place, found[1][:SHOWN]))
    if found := _CHOICE.fullmatch(message):
        return JsonFault(found[1][:SHOWN] + NO_CHOICE, place)
    if "out of range" in message:
        return JsonFault("the number is out of range", place)
    return JsonFault(message, place)  # of a record's own check, in our words


def _name_types(listed: str) -> str:
    names = [_TYPES.get(name.strip(), name.strip()) for name in listed.split("|")]
    return " or ".join(names)


def _join(place: str, key: str) -> str:
    return f"{place}.{key}" if place else key

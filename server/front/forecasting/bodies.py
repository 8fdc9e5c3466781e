"""JSON bodies of forecasting clients, decoded in the front under a bound of their values. Pure.

These clients send series end to end, which are cut into DeepAR instances here, so their numbers are decoded in the
front. INVARIANT: no body is decoded before its values are counted: a value has a comma before it or is the first, and
a comma within a text only counts too many. Nesting is bounded by the records: what they do not know is skipped.
"""

import re
from typing import TypeVar

import msgspec

from server.errors import Refused, Situation

MAX_VALUES = 2**18  #: of one body, and of one answer: the event loop waits about 15 ms while they are decoded
T = TypeVar("T")
_PLACE = re.compile(r"(.*) - at `\$\.?(.*)`", re.DOTALL)
_WRONG_TYPE = re.compile(r"Expected `([^`]*)`, got `([^`]*)`")
_MISSING = re.compile(r"Object missing required field `([^`]*)`")
_TYPES = {
    "int": "a whole number",
    "float": "a number",
    "str": "text",
    "bool": "true or false",
    "array": "a list",
    "object": "an object",
    "null": "null",
}


def decode_body(decoder: "msgspec.json.Decoder[T]", body: bytes) -> T:
    """The record in a body. Raises Refused that names the field, TOO_LARGE for too many values."""
    require_few(body.count(b",") + 1, "the body")
    try:
        return decoder.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise _explain(str(error)) from None


def require_few(values: int, what: str) -> None:
    """Raises Refused(TOO_LARGE) for more values than a front decodes or writes for one call."""
    if values > MAX_VALUES:
        message = f"{what} has {values} values, {MAX_VALUES} are the most of one call; send fewer series in one"
        raise Refused(Situation.TOO_LARGE, message)


def _explain(said: str) -> Refused:
    """The decoder's complaint in words of ours."""
    field, message = None, said
    if found := _PLACE.fullmatch(said):
        message, field = found.group(1), found.group(2) or None
    if found := _WRONG_TYPE.fullmatch(message):
        wanted = " or ".join(_TYPES.get(each, each) for each in found[1].split(" | "))
        message = f"expected {wanted}, not {_TYPES.get(found[2], found[2])}"
    elif found := _MISSING.fullmatch(message):
        field = f"{field}.{found[1]}" if field else found[1]
        message = f"{found[1]} is missing"
    else:
        message = f"not a request for forecasts: {message}"
    return Refused(Situation.BAD_REQUEST, message, field=field)


def say_place(why: Refused, instance: str = "instance") -> str:
    """The refusal in one sentence with its place: these clients show nothing else. `instance`: what they call one."""
    detail = why.detail
    place = [] if detail.instance is None else [f"{instance} {detail.instance}"]
    place += [] if detail.field is None else [detail.field]
    return f"{', '.join(place)}: {detail.message}" if place else detail.message

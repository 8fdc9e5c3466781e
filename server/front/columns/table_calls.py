"""Calls for many models that come or go as tables: which they are, and what is asked. Pure."""

from dataclasses import replace

import msgspec

from server.contract import NPY
from server.errors import Refused, Situation
from server.front.columns.arrow_reader import ARROW, read_arrow
from server.front.columns.asked_table import check_columns, cut_rows
from server.front.columns.npy_reader import read_npy
from server.front.exchange import Limit
from server.front.fan_out import MultiModelCall
from server.front.slices import Slices

MOST_CONFIGURATION_BYTES = 64 * 1024
JOINT = "joint scenarios are no table: ask for them by JSON"
NOT_TAKEN = "content type {!r} is not taken here; send application/json, {} or {} (.npy or .npz)"
_NEAR = ("application/vnd.apache.", "application/x-np")  #: what begins so and is no table is refused, not read as JSON


class _Configuration(msgspec.Struct):
    """What a table's configuration may not ask for; the models check the rest."""

    joint: bool = False


_configuration = msgspec.json.Decoder(_Configuration)


def find_table(content_type: str) -> str | None:
    """The type of the table that a body is; None for JSON, as which any other is read, as it always was.

    Raises Refused for what is nearly a table.
    """
    sent = content_type.partition(";")[0].strip().lower()
    if sent in (ARROW, NPY):
        return sent
    if sent.startswith(_NEAR):
        raise Refused(Situation.UNSUPPORTED_CODING, NOT_TAKEN.format(sent[:80], ARROW, NPY), field="content-type")
    return None


def choose_answer(content_type: str, accept: str) -> str | None:
    """The type of a table of answers; None for an answer in JSON. Raises Refused."""
    wanted = accept.lower()
    for each in (ARROW, NPY):
        if each in wanted:
            return each
    anything = not wanted.strip() or wanted.strip() == "*/*"
    return find_table(content_type) if anything else None


def read_table_call(body: bytes, item_limit: Limit, kind: str = ARROW) -> Slices[MultiModelCall]:
    """The call in a table of that type. Raises Refused."""
    table = yield from (read_npy(body) if kind == NPY else read_arrow(body))
    check_columns(table)
    text = (table.shared.get("configuration") or "{}").encode()
    _check_configuration(text)
    items = yield from cut_rows(table, item_limit.bytes, item_limit.setting)
    return MultiModelCall(items, text, None, len(body))


def replace_numbers(call: MultiModelCall) -> MultiModelCall:
    """The same call, answered as rows of blocks. Raises Refused for joint scenarios."""
    if call.joint is not None:
        raise Refused(Situation.BAD_REQUEST, JOINT, field="configuration.joint")
    return replace(call, numbers=True)


def _check_configuration(text: bytes) -> None:
    if len(text) > MOST_CONFIGURATION_BYTES:
        message = f"it has {len(text)} bytes, {MOST_CONFIGURATION_BYTES} are the most in a table"
        raise Refused(Situation.TOO_LARGE, message, field="configuration")
    try:
        joint = _configuration.decode(text).joint
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        message = f"the table's `configuration` is no JSON object as in a JSON call: {error}"
        raise Refused(Situation.BAD_REQUEST, message, field="configuration") from None
    if joint:
        raise Refused(Situation.BAD_REQUEST, JOINT, field="configuration.joint")

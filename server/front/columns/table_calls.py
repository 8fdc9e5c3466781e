"""Calls for many models that come or go as tables: which they are, and what is asked. Pure."""

from dataclasses import replace

import msgspec

from server.contract import NPY
from server.errors import Refused, Situation
from server.front.columns.arrow_reader import ARROW, read_arrow
from server.front.columns.asked_table import check_columns, cut_rows
from server.front.exchange import Limit
from server.front.fan_out import MultiModelCall
from server.front.slices import Slices

MOST_CONFIGURATION_BYTES = 64 * 1024
JOINT = "joint scenarios are no table: ask for them by JSON"
NOT_TAKEN = "content type {!r} is not taken here; send application/json or {}"


class _Configuration(msgspec.Struct):
    """What a table's configuration may not ask for; the models check the rest."""

    joint: bool = False


_configuration = msgspec.json.Decoder(_Configuration)


def is_table(content_type: str) -> bool:
    """Whether a body is a table. Any other is read as JSON, whatever it is called, as it always was. Raises Refused."""
    sent = content_type.partition(";")[0].strip().lower()
    if sent == NPY or (sent.startswith("application/vnd.apache.") and sent != ARROW):
        raise Refused(Situation.UNSUPPORTED_CODING, NOT_TAKEN.format(sent[:80], ARROW), field="content-type")
    return sent == ARROW


def choose_answer(content_type: str, accept: str) -> str | None:
    """The type of a table of answers; None for an answer in JSON, or one array of scenarios."""
    wanted = accept.lower()
    if ARROW in wanted:
        return ARROW
    anything = not wanted.strip() or wanted.strip() == "*/*"
    return ARROW if anything and is_table(content_type) else None


def read_table_call(body: bytes, item_limit: Limit) -> Slices[MultiModelCall]:
    """The call in a table. Raises Refused."""
    table = yield from read_arrow(body)
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
        message = f"the schema's metadata `configuration` is no JSON object as in a JSON call: {error}"
        raise Refused(Situation.BAD_REQUEST, message, field="configuration") from None
    if joint:
        raise Refused(Situation.BAD_REQUEST, JOINT, field="configuration.joint")

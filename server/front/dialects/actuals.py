"""`POST /v1/actuals`: observed prices of many models, which adapt their bands and are scored. Runs in a front.

A front only reads and bounds the call. The supervisor pairs prices with what was forecast, and answers once they are on
the disk and all workers follow.
"""

import math
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from model_store.archives.json_faults import FAULTS, explain_fault
from model_store.names import InvalidModelName, parse_model_name
from server.bands.book import Price
from server.contract import ACTUALS_PATH, JSON
from server.errors import Refused, Situation
from server.front.dialects.forecasts import RETRY_AFTER, STATUS, build_error
from server.front.exchange import DialectOperation, HttpReply, HttpRequest, Limit, wrong_method
from server.front.inference_plane import InferencePlane
from server.ipc.operations import ActualsReply, ObservedPrices
from server.routes.inference import ACTUALS
from server.settings import Settings

MOST_BYTES = 1024 * 1024
MOST_ITEMS = 1000
MOST_PRICES = 10_000  #: of all items of a call together
MOST_PRODUCT = 200  #: characters, as many as an archive's record allows
MOST_STAMP = 40  #: characters
LARGEST_PRICE = 1e12  #: so that sums of losses stay finite
BROWSERS = (b"origin", b"sec-fetch-site")  #: headers that browsers send, and no other client
OK = 200
_EPOCH = datetime.fromisoformat("1970-01-01")

Stamp = Annotated[str, Meta(max_length=MOST_STAMP)]


class _Item(Struct, forbid_unknown_fields=True):
    target_model: str
    stamps: Annotated[list[Stamp], Meta(max_length=MOST_PRICES)]
    prices: Annotated[list[float | None], Meta(max_length=MOST_PRICES)]
    product: Annotated[str, Meta(max_length=MOST_PRODUCT)] = ""


class _Call(Struct, forbid_unknown_fields=True):
    actuals: Annotated[list[_Item], Meta(min_length=1, max_length=MOST_ITEMS)]


_CALL = msgspec.json.Decoder(_Call)


class Actuals:
    """See the module."""

    name = "actuals"
    routes = ACTUALS
    paths = f"{ACTUALS_PATH} (observed prices)"

    def __init__(self, settings: Settings) -> None:
        limit = Limit(min(MOST_BYTES, int(settings.max_body_bytes)), "max_body_bytes, at most 1 MiB")
        self._record = DialectOperation("record", limit)
        self._status = {**STATUS, Situation.OVERLOADED: int(settings.overload_status)}

    def match(self, method: str, path: str, query: bytes = b"") -> DialectOperation | None:
        """POST to `/v1/actuals`."""
        del query
        if path != ACTUALS_PATH:
            return None
        if method != "POST":
            raise wrong_method(method)
        return self._record

    async def answer(self, operation: DialectOperation, request: HttpRequest, plane: InferencePlane) -> HttpReply:
        """Counts by item, in order. All of the call is taken, or nothing."""
        del operation
        if any(name in request.headers for name in BROWSERS):  # a page anywhere can have its visitor send this
            raise Refused(Situation.FORBIDDEN, "a browser may not send prices: they change bands")
        items = parse_actuals(request.body)
        reply = await plane.record_actuals(items, request.deadline)
        return HttpReply(OK, JSON, _write_reply(items, reply))

    def refused(self, why: Refused, request: HttpRequest) -> HttpReply:
        """The call's error, as that of a call for forecasts."""
        del request
        retry_ms = why.detail.retry_ms or (1000 if why.situation in RETRY_AFTER else 0)
        headers = [(b"retry-after", b"%d" % -(-retry_ms // 1000))] if retry_ms else []
        return HttpReply(self._status[why.situation], JSON, build_error(why), headers)


def parse_actuals(body: bytes) -> list[ObservedPrices]:
    """Parse a call; prices that are null are left out. Raises Refused that says where it is wrong."""
    try:
        call = _CALL.decode(body)
    except FAULTS as error:
        fault = explain_fault(error)
        message = f"not a call with prices: {fault.message}"
        raise Refused(Situation.BAD_REQUEST, message, field=fault.place or None) from None
    total = sum(len(item.stamps) for item in call.actuals)
    if total > MOST_PRICES:
        message = f"a call has {MOST_PRICES} prices at most, not {total}; send several"
        raise Refused(Situation.BAD_REQUEST, message, field="actuals")
    return [_parse_item(item, f"actuals[{i}]") for i, item in enumerate(call.actuals)]


def _parse_item(item: _Item, place: str) -> ObservedPrices:
    try:
        model = parse_model_name(item.target_model)
    except InvalidModelName as error:
        raise Refused(Situation.BAD_NAME, str(error), field=f"{place}.target_model") from None
    if len(item.stamps) != len(item.prices):
        message = f"{len(item.stamps)} stamps, but {len(item.prices)} prices; send one for each"
        raise Refused(Situation.BAD_REQUEST, message, field=place)
    prices = []
    for i, (stamp, price) in enumerate(zip(item.stamps, item.prices, strict=True)):
        if price is None:
            continue
        if not (math.isfinite(price) and abs(price) <= LARGEST_PRICE):
            message = f"{price:g} is no price; send null where there is none"
            raise Refused(Situation.BAD_REQUEST, message, field=f"{place}.prices[{i}]")
        prices.append(_parse_price(stamp, price, f"{place}.stamps[{i}]"))
    return ObservedPrices(model, prices, item.product)


def _parse_price(stamp: str, price: float, place: str) -> Price:
    try:
        at = datetime.fromisoformat(stamp)
        if at.tzinfo is None:
            seconds = (at - _EPOCH).total_seconds()
        else:
            seconds = (at - datetime.fromtimestamp(0, UTC)).total_seconds()
    except (ValueError, OverflowError):
        message = f"{stamp!r} is no time stamp, such as 2026-01-01 00:00:00 or 2026-01-01T00:00:00+01:00"
        raise Refused(Situation.BAD_REQUEST, message, field=place) from None
    return Price(math.floor(seconds), at.tzinfo is not None, price)


def _write_reply(items: Sequence[ObservedPrices], reply: ActualsReply) -> bytes:
    results = [
        {
            "target_model": item.model,
            **({"product": item.product} if item.product else {}),
            "paired": counts.paired,
            "repeated": counts.repeated,
            "unmatched": counts.unmatched,
        }
        for item, counts in zip(items, reply.counts, strict=True)
    ]
    found: dict[str, object] = {"results": results, "adapted": reply.adapted}
    if reply.unheard:
        found["unheard_workers"] = reply.unheard
    return msgspec.json.encode(found)

"""A call for many models under way: every item at its worker at once, then the correlation where they are joint.

Runs in a front. What the bodies say is `server.front.dialects.forecasts`' to know.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from server.errors import Refused, Situation
from server.front.dataplane import Calls, ClientGone, Receive, nobody, refusal, whole
from server.front.dialects import forecasts
from server.front.dialects.forecasts import Item, Prediction, Sliced
from server.front.worker_client import WorkerLost

MAX_UNDER_WAY = 1024  #: items of one call that are at the workers at once
JSON, NPY = "application/json", "application/x-npy"
HALF = "the worker died with half of the answer; try again"


@dataclass(frozen=True, slots=True)
class Limit:
    """The bytes a body may have, and the setting that says so."""

    bytes: int
    setting: str

    def check(self, size: int) -> None:
        """Raises Refused."""
        if size > self.bytes:
            message = f"the body has {size} bytes or more, the limit is {self.bytes} ({self.setting})"
            raise Refused(Situation.TOO_LARGE, message)

    def check_answers(self, size: int) -> None:
        """As `check`, for what many models answer together."""
        if size > self.bytes:
            message = f"the answers have more than {self.bytes} bytes together ({self.setting})"
            raise Refused(Situation.TOO_LARGE, f"{message}; ask for less in one call")


@dataclass(frozen=True, slots=True)
class Together:
    """The answer: its body, its type, and what came of each item."""

    body: bytes
    media: str
    found: Sequence[Prediction | Refused]


async def answer(calls: Calls, body: bytes, wanted: str, limit: Limit, deadline: float, receive: Receive) -> Together:
    """The whole call; `wanted` is JSON, or NPY for joint scenarios as one array.

    Raises Refused for a call that fails as a whole, ClientGone when nobody waits any more.
    """
    sliced = forecasts.sliced(body)
    found = await _all(calls, sliced, limit, deadline, receive)
    if sliced.joint is None or not any(isinstance(each, Prediction) for each in found):
        return Together(forecasts.spliced(found), JSON, found)
    if wanted == NPY:  # one array has no place for an item that failed
        forecasts.require_all(found)
    asked = forecasts.together(sliced.joint, sliced.items, found)
    link, call, response = await calls.ask(sliced.joint.correlation, JSON, wanted, deadline, asked, receive)
    try:
        if response.situation:
            raise forecasts.misplaced(found, await refusal(link, call, response))
        scenarios = await whole(link, call, response)
    except WorkerLost:
        raise Refused(Situation.WORKER_LOST, HALF) from None
    limit.check_answers(len(scenarios))
    if wanted == NPY:
        return Together(scenarios, NPY, found)
    return Together(forecasts.spliced(forecasts.sampled(found, scenarios)), JSON, found)


async def _all(
    calls: Calls, sliced: Sliced, limit: Limit, deadline: float, receive: Receive
) -> list[Prediction | Refused]:
    """What came of each item, in order."""
    room = asyncio.Semaphore(MAX_UNDER_WAY)
    answered = 0

    async def one(item: Item | Refused) -> Prediction | Refused:
        nonlocal answered
        if isinstance(item, Refused):
            return item
        async with room:
            found = await _one(calls, item, deadline, marginal=sliced.joint is not None)
        answered += 0 if isinstance(found, Refused) else len(found.body)
        limit.check_answers(answered)
        return found

    items = asyncio.gather(*map(one, sliced.items))
    gone = asyncio.ensure_future(receive())  # the body has been read: the next message can only be that
    try:
        await asyncio.wait((items, gone), return_when=asyncio.FIRST_COMPLETED)
        if not items.done():
            raise ClientGone
        return items.result()
    finally:
        gone.cancel()
        items.cancel()
        await asyncio.gather(items, gone, return_exceptions=True)


async def _one(calls: Calls, item: Item, deadline: float, *, marginal: bool) -> Prediction | Refused:
    """One item's prediction, or why there is none."""
    try:
        link, call, response = await calls.ask(item.model, JSON, JSON, deadline, item.body, nobody)
        if response.situation:
            return await refusal(link, call, response)
        return Prediction(forecasts.prediction(await whole(link, call, response), marginal=marginal), response)
    except Refused as refused:
        return refused
    except WorkerLost:
        return Refused(Situation.WORKER_LOST, HALF)

"""Calls to workers: routed, watched, and asked once more elsewhere when a worker dies with one. Runs in a front."""

import asyncio
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import msgspec

from model_store.names import ModelName
from server.errors import Detail, Refused, Situation
from server.front.worker_client import Call, Link, WorkerLost
from server.ipc import frames as wire
from server.routing import Lane, Router

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]

WATCH_AFTER_S = 0.5


class ClientGone(Exception):
    """The connection ends before the answer: the client left or does not read, or half an answer is all we have."""


async def nobody() -> MutableMapping[str, Any]:
    """Stands where a receive channel is that has its watcher already, or is none of ours to watch."""
    return {}


class Calls:
    """One front's calls. `links` are the connections to the workers that are up, by worker."""

    def __init__(self) -> None:
        self.router = Router()
        self.links: dict[int, Link] = {}
        self._watched: dict[Call, tuple[float, Receive, Link]] = {}
        self._watchers: set[asyncio.Task[None]] = set()

    def __repr__(self) -> str:
        """For example `<Calls 2 links, 12 under way>`."""
        return f"<Calls {len(self.links)} links, {len(self._watched)} under way>"

    async def ask(
        self, model: ModelName, content_type: str, accept: str, deadline: float, body: bytes, receive: Receive
    ) -> tuple[Link, Call, wire.Response]:
        """The worker's response. When the worker dies with it, one other worker is asked: a forecast has no effects."""
        avoid: int | None = None
        while True:
            now = time.monotonic()
            lane = self.router.route(model, now, avoid)
            link = None if lane is None else self.links.get(lane.worker)
            if lane is None or link is None:
                if avoid is not None:
                    raise Refused(
                        Situation.WORKER_LOST, "the worker died with this request, and no other is up; try again"
                    )
                raise Refused(Situation.NOT_READY, "no worker is up yet; try again")
            counted = self.router.started(lane, model)
            call = link.call(model, content_type, accept, deadline, body)
            self._watched[call] = (now, receive, link)
            try:
                response = await call.reply
            except WorkerLost:
                self.router.ended(lane, model, counted, held=False)
                if avoid is not None:
                    message = "two workers died with this request; it is not tried again"
                    raise Refused(Situation.WORKER_LOST, message) from None
                avoid = lane.worker
                continue
            except BaseException:
                link.cancel(call)
                self.router.ended(lane, model, counted, held=False)
                raise
            finally:
                del self._watched[call]
            self._learn(lane, model, counted, response)
            return link, call, response

    def _learn(self, lane: Lane, model: ModelName, counted: bool, response: wire.Response) -> None:
        """What the answer says of the worker's pace and of where the model is."""
        held = response.situation in (0, Situation.BAD_REQUEST, Situation.MODEL_FAILED)
        wait = (response.queue_us + response.inference_us) / 1e6
        load = response.load_us / 1e6 if response.cache == wire.CacheResult.MISS and held else 0.0
        self.router.ended(lane, model, counted, held=held, wait_s=wait, load_s=load)

    def sweep(self) -> None:
        """Called every tenth of a second: deadlines, and clients that left while their request was slow."""
        now = time.monotonic()
        for link in self.links.values():
            link.sweep(now)
        for call, (since, receive, link) in list(self._watched.items()):
            if now - since > WATCH_AFTER_S and not call.reply.done() and receive is not nobody:
                self._watched[call] = (since, nobody, link)
                task = asyncio.create_task(_watch(call, receive, link))
                self._watchers.add(task)
                task.add_done_callback(self._watchers.discard)


async def whole(link: Link, call: Call, response: wire.Response) -> bytes:
    """The response's body to its end. Raises WorkerLost."""
    try:
        return response.body + b"".join([part async for part in link.rest(call)])
    except BaseException:
        link.cancel(call)
        raise


async def refusal(link: Link, call: Call, response: wire.Response) -> Refused:
    """What a worker says instead of an answer."""
    detail = msgspec.json.decode(await whole(link, call, response), type=Detail)
    return Refused(Situation(response.situation), detail.message, detail.instance, detail.field)


async def _watch(call: Call, receive: Receive, link: Link) -> None:
    """Cancel the call when its client leaves. The body has been read, so the next message can only be that."""
    message = await receive()
    if message["type"] == "http.disconnect" and not call.reply.done():
        link.cancel(call)
        call.reply.set_exception(ClientGone())

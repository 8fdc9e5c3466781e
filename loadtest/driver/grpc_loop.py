"""The open-loop driver's other half: the same schedule over gRPC, whose calls share a few connections.

It needs grpcio (`pip install 'fleetcast[grpc]'`), sends messages that were made before, and counts gRPC's own statuses.
Everything else is as in `open_loop`, which runs it: one process, one thread, one event loop.
"""

import asyncio
from contextlib import suppress
from typing import Any

import grpc
import numpy as np

from loadtest.driver.dialects import MOST_WORDS, find_fault
from loadtest.driver.grpc_messages import read_infer
from loadtest.driver.open_loop import LEAD_S, SAMPLES, LoadTarget
from loadtest.driver.profiles import Schedule
from loadtest.driver.run_result import CACHE, GRPC, NO_ANSWER, OK, Run
from server.contract import HEADER_CACHE

CHANNELS = 4  #: connections; a server of ours takes 1024 calls on each


class GrpcDriver:
    """The run of one schedule, with at most `calls` under way."""

    def __init__(self, loop: asyncio.AbstractEventLoop, schedule: Schedule, to: LoadTarget, calls: int) -> None:
        n = len(schedule.at)
        self._loop, self._schedule, self._to = loop, schedule, to
        self._start, self._places = 0.0, asyncio.Semaphore(calls)
        self._woken, self._sent, self._done = (np.full(n, np.nan) for _ in range(3))
        self._status, self._cache = np.full(n, NO_ANSWER), np.zeros(n, np.int64)
        self._sampled = frozenset(range(0, n, max(1, n // SAMPLES)))
        self._samples: dict[int, bytes] = {}
        self._said: dict[int, str] = {}
        self._exhausted = False

    def __repr__(self) -> str:
        """For example `<GrpcDriver of 300 calls to ...>`."""
        return f"<GrpcDriver of {len(self._status)} calls to {self._to.host}:{self._to.port}>"

    async def run(self, patience_s: float, start: float | None) -> Run:
        """Send the schedule. The result is that of `open_loop.send_schedule`."""
        channels = [_open_channel(self._to) for _ in range(CHANNELS)]
        calls = [channel.unary_unary(self._to.method, None, None) for channel in channels]
        self._start = self._loop.time() + LEAD_S if start is None else start
        end = self._start + self._schedule.seconds + patience_s
        tasks: list[asyncio.Task[None]] = []
        with suppress(TimeoutError):
            async with asyncio.timeout_at(end):
                for request, at in enumerate(self._schedule.at.tolist()):
                    if (left_s := at - self._now()) > 0:
                        await asyncio.sleep(left_s)
                    self._woken[request] = self._now()
                    tasks.append(asyncio.create_task(self._ask(request, calls[request % CHANNELS])))
                await asyncio.gather(*tasks)
        ended = self._now()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for channel in channels:
            await channel.close(None)
        found = [(i, why) for i, body in self._samples.items() if (why := _find_fault(body))]
        arrays = (self._woken, self._sent, self._done, self._status, self._cache)
        return Run(self._schedule, *arrays, ended, self._exhausted, len(self._samples), found, said=self._said)

    def _now(self) -> float:
        return self._loop.time() - self._start

    async def _ask(self, request: int, call: Any) -> None:
        self._exhausted |= self._places.locked()
        async with self._places:
            self._sent[request] = self._now()
            asked = call(self._to.requests[self._schedule.model[request]], metadata=self._to.metadata)
            try:
                answer = await asked
                trailing = await asked.trailing_metadata()
            except grpc.aio.AioRpcError as error:
                status, trailing = GRPC + error.code().value[0], error.trailing_metadata()
                self._said.setdefault(status, _clean(error.details()))
            else:
                status = OK
                if request in self._sampled:
                    self._samples[request] = answer
            cache = str(dict(trailing or ()).get(HEADER_CACHE.lower(), ""))
            self._cache[request] = CACHE.index(cache) if cache in CACHE else 0
            self._done[request], self._status[request] = self._now(), status


def _open_channel(to: LoadTarget) -> grpc.aio.Channel:
    """A connection of its own, with the target's certificates where it has TLS."""
    options: list[tuple[str, Any]] = [
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.enable_retries", 0),  # a failure is counted as such
        ("grpc.max_receive_message_length", -1),
        ("grpc.enable_http_proxy", 0),
    ]
    host = f"[{to.host}]" if ":" in to.host else to.host
    address = f"{host}:{to.port}"
    if to.tls_name is None:
        return grpc.aio.insecure_channel(address, options=options)
    access = to.access
    chain = None if access.client_cert is None else access.client_cert.read_bytes()
    key = chain if access.client_key is None else access.client_key.read_bytes()
    authority = None if access.ca is None else access.ca.read_bytes()
    credentials = grpc.ssl_channel_credentials(authority, key, chain)
    options.append(("grpc.ssl_target_name_override", to.tls_name))
    return grpc.aio.secure_channel(address, credentials, options=options)


def _find_fault(answer: bytes) -> str | None:
    try:
        return find_fault(read_infer(answer))
    except ValueError as error:
        return str(error)


def _clean(words: str | None) -> str:
    said = " ".join((words or "").split())[:MOST_WORDS]
    return "".join(each if each.isprintable() else "?" for each in said)

"""Begins and ends the traces of one front: which requests are traced, and what is handed to the exporter.

On the front's event loop.
"""

import os
import time
from collections.abc import Callable, Mapping
from typing import Protocol

from server.front.tracing.plan import TracingPlan
from server.front.tracing.request_trace import RequestTrace
from server.front.tracing.sampling import TraceBudget
from server.front.tracing.trace_context import TRACE_PARENT, read_trace_parent
from server.metrics import TraceSeries


class TraceTaker(Protocol):
    """Where traces go that are over."""

    def put(self, trace: RequestTrace) -> None:
        """Take it, or drop it where too many wait. It returns at once."""


class Tracer:
    """See the module. `counted`: what became of traces; `now`: the monotonic clock in seconds."""

    def __init__(
        self, plan: TracingPlan, exporter: TraceTaker, counted: TraceSeries, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._sampler, self._exporter, self._counted, self._now = plan.sampler, exporter, counted, now
        self._budget = TraceBudget(plan.per_second, now)

    def __repr__(self) -> str:
        """For example `<Tracer <Sampler 1 of requests, others as their clients decided>>`."""
        return f"<Tracer {self._sampler!r}>"

    def begin(self, headers: Mapping[bytes, bytes], began: float) -> RequestTrace | None:
        """The trace of a request that came at `began`; None where it is not sampled."""
        parent = read_trace_parent(headers) if TRACE_PARENT in headers else None
        trace_id = make_id(16) if parent is None else parent.trace_id
        if not self._sampler.wants(parent, trace_id):
            return None
        if not self._budget.take():
            self._counted.skipped.inc()
            return None
        return RequestTrace(trace_id, make_id(8), parent, began)

    def end(self, trace: RequestTrace, status: int) -> None:
        """The request is answered with this HTTP status, or what stands for it."""
        trace.status, trace.ended = status, self._now()
        self._exporter.put(trace)


def make_id(size: int) -> str:
    """A random id of so many bytes, in hexadecimal; not zero, which would be none."""
    while not any(found := os.urandom(size)):
        pass
    return found.hex()

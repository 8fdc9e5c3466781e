"""Turns tracing on in a front, where the settings or OpenTelemetry's variables say so."""

import asyncio
import os
from dataclasses import dataclass

from server.front.tracing.exporter import OtlpSender, TraceExporter
from server.front.tracing.plan import plan_tracing
from server.front.tracing.tracer import Tracer
from server.metrics import FrontMetrics
from server.sdk import __version__
from server.settings import Settings


@dataclass(frozen=True, slots=True)
class Tracing:
    """One front's tracer and exporter; None where nothing is traced."""

    tracer: Tracer | None = None
    exporter: TraceExporter | None = None

    async def close(self) -> None:
        """Send the last traces, for a bounded time, while the loop goes on."""
        if self.exporter is not None:
            await asyncio.to_thread(self.exporter.close)


def open_tracing(settings: Settings, metrics: FrontMetrics) -> Tracing:
    """The tracing of this process. Raises ValueError for settings or variables that are wrong."""
    plan = plan_tracing(settings.otlp_endpoint, settings.trace_ratio, settings.traces_per_s, os.environ)
    if plan is None:
        return Tracing()
    exporter = TraceExporter(lambda: OtlpSender(plan.url, __version__), metrics.traces)
    return Tracing(Tracer(plan, exporter, metrics.traces), exporter)

"""`fleetcast serve`: the supervisor's process, from start to drained. Imports no torch."""

import asyncio
import contextlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from server.access.sites import is_loopback
from server.cli.setting_flags import settings_from, with_setting_flags
from server.cli.terminal import one_line_errors
from server.contract import HEADER_TARGET_MODEL
from server.front.tracing.plan import TracingPlan, plan_tracing, require_exporter
from server.sagemaker_container.environment import MULTI_MODEL, SINGLE_MODEL
from server.sdk import __version__
from server.settings import Settings, format_bytes

if TYPE_CHECKING:
    from server.supervisor.supervisor import Supervisor


@with_setting_flags
def serve(**flags: Any) -> None:
    """Run the server until SIGTERM or Ctrl-C, then finish what is running and exit; at the second one exit at once.

    \b
    fleetcast serve --store ./models
    fleetcast serve --store s3://models/prices --model-cache-bytes 2GiB --pin au/nsw1.mar
    FLEETCAST_STORE=gs://models/prices fleetcast serve --inference-port 9000

    Each flag is also a variable (--inference-port is FLEETCAST_INFERENCE_PORT) and a key of fleetcast.toml in the
    working folder (inference_port = 9000). Flags win over variables, variables over the file.
    """  # noqa: D301
    import uvloop  # noqa: PLC0415

    from server.logs import configure_logs  # noqa: PLC0415
    from server.supervisor.host_files import StartFailed  # noqa: PLC0415

    with one_line_errors(StartFailed):
        settings = settings_from(flags)
        if plan_traces(settings) is not None:
            require_exporter()
        configure_logs(settings.log_level, settings.log_format)
        if flags.get("access_keys"):
            warn_of_flag()
        uvloop.run(_serve_until_signal(settings))


def plan_traces(settings: Settings) -> TracingPlan | None:
    """What is traced, None where nothing is. Raises ValueError for a setting or a variable that is wrong."""
    return plan_tracing(settings.otlp_endpoint, settings.trace_ratio, settings.traces_per_s, os.environ)


def warn_of_flag() -> None:
    """Say that a flag's secret is no secret any more."""
    import structlog  # noqa: PLC0415 -- a tenth of a second that help need not take

    structlog.get_logger().warning(
        "secret_on_command_line", why="every user of this host reads --access-keys by ps: use --access-keys-file"
    )


async def _serve_until_signal(settings: Settings) -> None:
    """From start to drained; a signal during the start ends it as well.

    INVARIANT: it takes at most `drain_s` + LONGEST_END_S from the signal on, whatever is stuck.
    """
    from rich.console import Console  # noqa: PLC0415

    from server.logs import STANDARD_OUTPUT  # noqa: PLC0415
    from server.supervisor.management_api import run_server  # noqa: PLC0415
    from server.supervisor.stop_signals import StopSignals  # noqa: PLC0415
    from server.supervisor.supervisor import LONGEST_END_S  # noqa: PLC0415

    signals = StopSignals()
    told = asyncio.create_task(signals.told.wait())
    told.add_done_callback(lambda _: signals.limit(settings.drain_s + LONGEST_END_S))
    async with contextlib.AsyncExitStack() as stack:
        start = asyncio.create_task(stack.enter_async_context(run_server(settings, signals)))
        await asyncio.wait({start, told}, return_when=asyncio.FIRST_COMPLETED)
        if told.done():
            start.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await start
            return
        supervisor, addresses = await start
        console = Console(soft_wrap=True, highlight=False)
        with console.capture() as shown:
            for label, text in _list_addresses(supervisor, addresses):
                console.print(f"[bold]{label:<12}[/]", end="")
                console.print(text, markup=False)
        STANDARD_OUTPUT.write(shown.get().removesuffix("\n"))  # a reader that has stopped must not hold us up
        await told
        STANDARD_OUTPUT.write(
            f"stopping: no new connections, requests are finished within {settings.drain_s:g} s; again to stop at once"
        )
    STANDARD_OUTPUT.flush()


def _describe_access(settings: Settings) -> str:
    """Who may ask: what protects the inference listener, or that nothing does."""
    protections = [
        *(["tokens"] if settings.tokens else []),
        *(["signatures"] if settings.access_keys else []),
        *(["clients' certificates"] if settings.tls_client_ca else []),
    ]
    hosts = [settings.inference_host or settings.host, *([] if settings.grpc_port is None else [settings.grpc_host])]
    wire = "TLS" if settings.tls_certificate else "no TLS"
    if protections:
        return f"{', '.join(protections)}; {wire}"
    host = next((host for host in hosts if not is_loopback(host)), None)
    if host is None:
        return f"open to every user of this host; {wire}"
    return f"OPEN: whoever reaches {host} may ask every model (tokens, access_keys_file or tls_client_ca); {wire}"


def _describe_inference(settings: Settings, address: str) -> str:
    """Where requests go, and how they name their model."""
    if settings.container == MULTI_MODEL:
        return f"{address}/models: SageMaker loads and unloads, and asks /models/NAME/invoke"
    if settings.container == SINGLE_MODEL:
        return f"{address}/invocations: SageMaker asks the one model"
    return f"{address}/invocations, the model in the header {HEADER_TARGET_MODEL}"


def _list_addresses(supervisor: "Supervisor", addresses: dict[str, str]) -> Iterator[tuple[str, str]]:
    """What runs where with which budget, a label and a text a line."""
    settings = supervisor.settings
    yield "fleetcast", f"{__version__} serves {settings.store}"
    yield "inference", _describe_inference(settings, addresses["inference"])
    yield "management", f"{addresses['management']}/fleet/models"
    yield "metrics", f"{addresses['metrics']}/metrics"
    if "grpc" in addresses:
        yield "grpc", f"{addresses['grpc'].partition('://')[2]}, the Open Inference Protocol"
    yield "access", _describe_access(settings)
    traces = plan_traces(settings)
    if traces is not None:
        yield "traces", f"to {traces.describe()}"
    for plan in supervisor.plans:
        threads = "1 thread" if plan.threads == 1 else f"{plan.threads} threads"
        cores = ",".join(map(str, plan.cores))
        room = format_bytes(plan.budget_bytes) if plan.budget_bytes else "its part of the GPU's memory"
        yield f"worker {plan.index}", f"{plan.device}, cores {cores}, {threads}, {room} for models"
    if settings.model_cache_bytes:
        origin = "as model_cache_bytes says"
    elif not supervisor.plans[0].budget_bytes:
        origin = "models lie in the GPUs' (gpu_reserve_bytes)"
    else:
        origin = "40 % of it is for models (model_cache_bytes)"
    yield "memory", f"{format_bytes(supervisor.host.memory_bytes)} on this host within its cgroup's limit; {origin}"
    if settings.disk_cache_bytes:
        yield "disk tier", f"{settings.disk_cache}, at most {format_bytes(settings.disk_cache_bytes)}"
    else:
        yield "disk tier", "off (disk_cache_bytes is 0)"
    yield "ready", "Ctrl-C or SIGTERM drains and stops, again it stops at once"

"""The files that all workers of a host share, and which the supervisor therefore tends: disk tier and access log.

Runs on the supervisor's event loop; what touches the disk runs on a thread.
"""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Sequence

import structlog

from model_store.stores.disk_cache import DiskTier, UnsafeDiskCache
from server.access_log import AccessLog, Arrivals
from server.metrics import HostMetrics
from server.settings import Settings

DISK_SWEEP_S = 5.0
DISK_REST = 25.0  #: times a sweep's processor time, which grows with the archives on disk, before the next
ACCESS_LOG_S = 1.0  #: how often workers are asked for their rows of the access log

log = structlog.get_logger()


class StartFailed(Exception):
    """The server cannot start with these settings; the message says why."""


def prepare_disk_cache(settings: Settings) -> None:
    """Make the disk tier's folders for this user alone. Raises StartFailed when others can write to them."""
    if not settings.disk_cache_bytes:
        return
    try:
        DiskTier(settings.disk_cache, settings.store).prepare()
    except UnsafeDiskCache as error:
        raise StartFailed(str(error)) from error


def open_access_log(settings: Settings) -> AccessLog | None:
    """The access log, where one is wanted. Raises StartFailed when it cannot be written."""
    if settings.access_log is None:
        return None
    try:
        return AccessLog(settings.access_log, int(settings.access_log_bytes))
    except OSError as error:
        raise StartFailed(f"--access-log {settings.access_log}: {error}") from error


async def keep_disk_cache(settings: Settings, metrics: HostMetrics) -> None:
    """Evict from the disk tier whenever it is above its size, until cancelled."""
    budget = int(settings.disk_cache_bytes)
    if not budget:
        return
    disk = DiskTier(settings.disk_cache, settings.store)
    metrics.disk_capacity.set(budget)
    while True:
        evicted, used, spent = await asyncio.to_thread(_sweep_disk, disk, budget)
        metrics.disk_evictions.inc(evicted)
        metrics.disk_bytes.set(used)
        await asyncio.sleep(max(DISK_SWEEP_S, DISK_REST * spent))


def _sweep_disk(disk: DiskTier, budget: int) -> tuple[int, int, float]:
    """One sweep of the disk tier: how many were evicted, bytes that are left, and processor seconds it took."""
    started = time.thread_time()
    evicted = len(disk.evict(budget))
    return evicted, disk.used_bytes(), time.thread_time() - started


async def keep_access_log(
    access_log: AccessLog,
    metrics: HostMetrics,
    take: Callable[[], Awaitable[Sequence[Arrivals]]],
    last: asyncio.Event,
) -> None:
    """Write what the workers have, every second and once more after `last` is set; then close the log."""
    with contextlib.closing(access_log):
        ending = False
        while not ending:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(ACCESS_LOG_S):
                    await last.wait()
            ending = last.is_set()
            taken = await take()
            count = sum(each.number for each in taken)
            metrics.not_logged.inc(sum(each.dropped for each in taken))
            try:
                await asyncio.to_thread(access_log.write, "".join(each.rows for each in taken))
            except OSError as error:
                metrics.not_logged.inc(count)
                log.warning("access_log_not_written", rows=count, error=str(error))
            else:
                metrics.logged.inc(count)

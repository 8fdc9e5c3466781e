"""How much of a GPU one worker gives to models: what is left of its share for contexts, forwards and other programs.

Pure. A worker calculates it once, after its self-check: CUDA's context and the libraries that the check has loaded then
count as used, and what the check itself needed has been given back.
"""

from server.worker.engine.accelerator import MAX_KEPT_BYTES
from server.worker.engine.staging import STAGING_BYTES, WORK_BYTES

#: What a CUDA context, its kernels and the libraries' handles take of a GPU in each process. It cannot be measured
#: where several processes share one, and is an estimate as long as there is no record from a GPU.
CONTEXT_BYTES = 512 * 1024 * 1024
#: The most that forwards of all families take beside their rows, unless a single row has more.
FORWARD_BYTES = STAGING_BYTES + WORK_BYTES + MAX_KEPT_BYTES


class NoBudget(ValueError):
    """The GPU has no room for these settings. The message has the numbers and says what to change."""


def cache_share(free_and_total: tuple[int, int], reserve_bytes: int, sharers: int) -> int:
    """A worker's cache budget in bytes: an equal share of the device without its own context and reserve.

    Each worker has a reserve, because each has staging and temporaries of its own. The share is one of the whole
    device, so that a restarted worker gets the same budget as before; it is at most what is free.
    """
    free, total = free_and_total
    return max(0, min(free, total // sharers - CONTEXT_BYTES) - reserve_bytes)


def choose_budget(
    device: str, wanted: int, least: int, free_and_total: tuple[int, int], reserve_bytes: int, sharers: int
) -> int:
    """Bytes for the models of one of `sharers` workers: `wanted`, or where that is 0 its share.

    Raises NoBudget where that is less than `least`, or where all of them do not fit on the device together.
    """
    free, total = free_and_total
    share = cache_share(free_and_total, reserve_bytes, sharers)
    most = max(0, total // sharers - CONTEXT_BYTES - reserve_bytes)
    here = (
        f"{device} has {free} of {total} bytes free; each of its {sharers} worker(s) needs {CONTEXT_BYTES} for CUDA's "
        f"context and {reserve_bytes} for forwards (gpu_reserve_bytes)"
    )
    if not wanted and share < least:
        raise NoBudget(
            f"{here}, which leaves {share} for models, less than one slab of {least} (slab_bytes): start fewer "
            "--workers-per-device, end other programs on this GPU, or lower gpu_reserve_bytes"
        )
    if wanted > most:
        raise NoBudget(
            f"{here}, which leaves {most} for models, but model_cache_bytes gives {wanted} to each: lower it, or start "
            "fewer --workers-per-device"
        )
    return wanted or share

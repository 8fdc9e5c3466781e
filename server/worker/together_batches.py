"""Decodes the items of calls for many models that run in one batch, all of a call at once. On the step thread."""

from collections.abc import Mapping, Sequence

from handlers.codecs.forecast_items import decode_items
from handlers.kinds import RowModel
from model_store.cache.slots import Slot
from server.ipc.together import PREDICTION
from server.worker.replies import get_slot
from server.worker.scheduler import Job
from server.worker.together_calls import TogetherCall


def decode_calls(jobs: Sequence[Job], rows: Mapping[Slot, RowModel], quick_bytes: float) -> None:
    """Give each job of a call for many models its decoded request, where it can be decoded with the others.

    `quick_bytes`: instances of more are long to decode. What is left is decoded as a request of its own.
    """
    calls: dict[int, list[Job]] = {}
    for job in jobs:
        if job.together is not None and job.call is None:
            calls.setdefault(id(job.together), []).append(job)
    for items in calls.values():
        _decode_call(items, rows, quick_bytes)


def _decode_call(jobs: Sequence[Job], rows: Mapping[Slot, RowModel], quick_bytes: float) -> None:
    call: TogetherCall = jobs[0].together
    if call.configuration is None:
        return
    codecs = [rows[get_slot(job)].codec for job in jobs]
    some = [
        (job, codec.forecaster)
        for job, codec in zip(jobs, codecs, strict=True)
        if codec.forecaster is not None and len(job.instance) <= min(codec.quick_bytes, quick_bytes)
    ]
    found = decode_items([each for _, each in some], [job.instance for job, _ in some], call.configuration, PREDICTION)
    for (job, _), decoded in zip(some, found, strict=True):
        job.call = decoded

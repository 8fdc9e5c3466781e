"""Decodes the items of calls for many models that run in one batch, all of a call at once. On the step thread."""

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from handlers.codecs.codec import FamilyCodec
from handlers.codecs.deepar_schema import Instance
from handlers.codecs.forecast_groups import ForecastNumbers
from handlers.codecs.forecast_items import AnswerForm, decode_items
from handlers.codecs.forecast_texts import read_instance
from handlers.errors import RequestError
from handlers.kinds import RowModel
from model_store.cache.slots import Slot
from server.ipc.packed import NUMBERS, PredictionHead, is_packed, pack_prediction, read_instance_head, write_instance
from server.ipc.together import PREDICTION
from server.worker.replies import Replies, get_slot
from server.worker.scheduler import Job
from server.worker.together_calls import TogetherCall

SEVERAL = "the model has {} products, and a table has one column `target`: ask it by JSON"


def pack_numbers(names: Sequence[str], numbers: ForecastNumbers) -> bytes:
    """Pack the numbers of one answer."""
    parts = [each for each in (numbers.mean, numbers.quantiles) if each is not None]
    levels = [] if numbers.quantiles is None else list(names)
    head = PredictionHead(numbers.start, parts[0].shape[-1] if parts else 0, numbers.mean is not None, levels)
    return pack_prediction(head, [each.tobytes() for each in parts])


AS_JSON, AS_NUMBERS = AnswerForm(PREDICTION), AnswerForm(NUMBERS, pack_numbers)


def decode_calls(jobs: Sequence[Job], rows: Mapping[Slot, RowModel], quick_bytes: float, replies: Replies) -> list[Job]:
    """Give each job of a call for many models its decoded request, where it can be decoded with the others.

    `quick_bytes`: instances of more are long to decode. Returns the jobs without those that are refused here; what has
    no decoded request has a body, as a request of its own.
    """
    calls: dict[int, list[Job]] = {}
    for job in jobs:
        if job.together is not None and job.call is None:
            calls.setdefault(id(job.together), []).append(job)
    for items in calls.values():
        _decode_call(items, rows, quick_bytes, replies)
    return build_bodies([job for job in jobs if not job.done], replies) if calls else list(jobs)


def build_bodies(jobs: Sequence[Job], replies: Replies) -> list[Job]:
    """Give items that came as rows of a table the body that they would have alone. Returns those that have one."""
    found = list[Job]()
    for job in jobs:
        if job.together is not None and job.call is None and not job.request.body and is_packed(job.instance):
            try:
                body = job.together.wrap_instance(write_instance(job.instance))
            except ValueError as error:
                replies.refuse_request(job, RequestError(str(error), field="target"))
                continue
            job.request = msgspec.structs.replace(job.request, body=body)
        found.append(job)
    return found


def _decode_call(jobs: Sequence[Job], rows: Mapping[Slot, RowModel], quick_bytes: float, replies: Replies) -> None:
    call: TogetherCall = jobs[0].together
    if call.configuration is None:
        return
    read = list[tuple[Job, Any, Instance[Any]]]()
    for job in jobs:
        codec = rows[get_slot(job)].codec
        if codec.forecaster is None or len(job.instance) > min(codec.quick_bytes, quick_bytes):
            continue
        instance = _read(job, codec, replies)
        if instance is not None:
            read.append((job, codec.forecaster, instance))
    codecs, instances = [codec for _, codec, _ in read], [instance for _, _, instance in read]
    found = decode_items(codecs, instances, call.configuration, AS_NUMBERS if call.wants_numbers else AS_JSON)
    for (job, _, _), decoded in zip(read, found, strict=True):
        if isinstance(decoded, RequestError):
            replies.refuse_request(job, decoded)
        else:
            job.call = decoded


def _read(job: Job, codec: FamilyCodec, replies: Replies) -> Instance[Any] | None:
    """The instance of an item, its numbers as arrays; None where it is decoded alone, or refused."""
    if not is_packed(job.instance):
        return read_instance(job.instance)
    assert codec.forecaster is not None, "it forecasts"
    products = len(codec.forecaster.forecast.products)
    if products > 1:
        replies.refuse_request(job, RequestError(SEVERAL.format(products), field="target"))
        return None
    head, series = read_instance_head(job.instance)
    target, *features = (np.frombuffer(each, f"<{head.code}") for each in series)
    names = head.names or None
    found: Any = features
    return Instance(head.start, target, head.cat or None, found or None, head.item_id, names=names)

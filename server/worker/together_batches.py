"""Decodes the items of calls for many models that run in one batch, all of a call at once. On the step thread."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import repeat
from typing import Any, NamedTuple

import msgspec
import numpy as np

from handlers.codecs.codec import FamilyCodec
from handlers.codecs.deepar import DeepAr
from handlers.codecs.deepar_schema import Instance
from handlers.codecs.forecast_groups import ForecastColumns, GroupNumbers, select_places
from handlers.codecs.forecast_items import AnswerForm, DecodedItems, ItemBlock, decode_items, decode_rows
from handlers.codecs.forecast_texts import read_instance
from handlers.codecs.tensors import Place
from handlers.errors import RequestError
from handlers.kinds import RowModel
from model_store.cache.slots import Slot
from server.ipc.packed import NUMBERS, BlockRows, NumbersBlock, TableRow, measure_instance, write_instance
from server.ipc.together import PREDICTION, RowColumns
from server.worker.replies import Replies, get_slot
from server.worker.scheduler import Job
from server.worker.together_calls import TogetherCall

SHORT_NUMBERS = 20_000  #: of an answer, which are written in 10 ms
SEVERAL = "the model has {} products, and a table has one column `target`: ask it by JSON"


def pack_numbers(names: Sequence[str], numbers: GroupNumbers) -> BlockRows:
    """The answers of a group as rows of one block."""
    columns, count = list[bytes](), 0
    if numbers.means is not None:
        columns.append(numbers.means.tobytes())
        count, steps = numbers.means.shape
    if numbers.quantiles is not None:
        columns += [each.tobytes() for each in np.ascontiguousarray(numbers.quantiles.transpose(2, 0, 1))]
        count, steps = numbers.quantiles.shape[:2]
    levels = [] if numbers.quantiles is None else list(names)
    return BlockRows(NumbersBlock(numbers.start, steps, numbers.means is not None, levels, columns), count)


AS_JSON, AS_NUMBERS = AnswerForm(PREDICTION), AnswerForm(NUMBERS, pack_numbers)


class JobBlock(NamedTuple):
    """Jobs of a call for many models that run and are answered as one."""

    jobs: Sequence[Job]
    items: ItemBlock


def decode_calls(
    jobs: Sequence[Job], rows: Mapping[Slot, RowModel], quick_bytes: float, replies: Replies, place: Place | None
) -> tuple[list[Job], list[JobBlock]]:
    """Decode the items of calls for many models, each call's with one another.

    `quick_bytes`: instances of more are long to decode. `place`: gives memory for the rows of a block; None: there is
    no room for blocks. Returns the jobs that run by themselves, and blocks. The former have a body as a request of its
    own or, where they were decoded with others, their decoded request. Jobs that are refused here are in neither.
    """
    calls: dict[int, list[Job]] = {}
    for job in jobs:
        if job.call is None and job.together is not None:
            items = calls.get(id(job.together))
            if items is None:
                calls[id(job.together)] = [job]
            else:
                items.append(job)
    blocks = list[JobBlock]()
    for items in calls.values():
        for block in _decode_call(items, rows, quick_bytes, replies, place):
            if place is not None and block.items.numbers <= SHORT_NUMBERS:
                blocks.append(block)
            else:
                for job, call in zip(block.jobs, block.items.split(), strict=True):
                    job.call = call
    if sum(len(block.jobs) for block in blocks) == len(jobs):  # as mostly
        return [], blocks
    taken = {id(job) for block in blocks for job in block.jobs}
    alone = [job for job in jobs if id(job) not in taken]
    return build_bodies(replies.drop_done(alone), replies), blocks


def build_bodies(jobs: Sequence[Job], replies: Replies) -> list[Job]:
    """Give items that are not decoded yet the body that they would have alone. Returns those that have one."""
    found = list[Job]()
    for job in jobs:
        if job.call is None and job.together is not None and not job.request.body:
            instance = job.together.get_instance(job)
            try:
                text = write_instance(instance) if isinstance(instance, TableRow) else instance
            except ValueError as error:
                replies.refuse_request(job, RequestError(str(error), field="target"))
                continue
            job.request = msgspec.structs.replace(job.request, body=job.together.wrap_instance(text))
        found.append(job)
    return found


def _decode_call(
    jobs: Sequence[Job], rows: Mapping[Slot, RowModel], quick_bytes: float, replies: Replies, place: Place | None
) -> list[JobBlock]:
    """Decode the items of one call: those that need not be decoded alone."""
    call: TogetherCall = jobs[0].together
    if call.configuration is None:
        return []
    taken, codecs = list[Job](), list[DeepAr]()
    is_table, most = call.columns is not None, min(quick_bytes, FamilyCodec.quick_bytes)
    for job, size in zip(jobs, _measure_instances(call.columns, jobs), strict=True):
        forecaster = rows[get_slot(job)].forecaster
        if forecaster is None or size > most:
            continue
        if is_table and forecaster.recipe is None and len(forecaster.forecast.products) > 1:
            message = SEVERAL.format(len(forecaster.forecast.products))
            replies.refuse_request(job, RequestError(message, field="target"))
            continue
        taken.append(job)
        codecs.append(forecaster)
    if not taken:
        return []
    form = AS_NUMBERS if call.wants_numbers else AS_JSON
    columns = None if call.columns is None else read_columns(call.columns, [job.request.id for job in taken])
    if columns is not None:
        return _keep(taken, decode_rows(codecs, columns, call.configuration, form, place), replies)
    instances = [_read(job) for job in taken]
    read = [i for i, instance in enumerate(instances) if instance is not None]
    some: Any = [instances[i] for i in read]
    found = decode_items([codecs[i] for i in read], some, call.configuration, form, place)
    return _keep([taken[i] for i in read], found, replies)


def _measure_instances(columns: RowColumns | None, jobs: Sequence[Job]) -> Iterable[int]:
    """The bytes that each job's instance counts; rows of series of one length all count as many."""
    if columns is not None and all(len(sizes) == 1 for sizes in columns.head.sizes):
        return repeat(columns.measure(0), len(jobs))
    if columns is not None:
        return [columns.measure(job.request.id) for job in jobs]
    return [measure_instance(job.instance) for job in jobs]


def _keep(jobs: Sequence[Job], found: DecodedItems, replies: Replies) -> list[JobBlock]:
    """Give jobs that are not in a block their decoded request, or refuse them. Returns the blocks."""
    for i, decoded in found.alone.items():
        if isinstance(decoded, RequestError):
            replies.refuse_request(jobs[i], decoded)
        else:
            jobs[i].call = decoded
    return [JobBlock([jobs[i] for i in block.places], block) for block in found.blocks]


def _read(job: Job) -> Instance[Any] | None:
    """The instance of an item, its numbers as arrays; None where it is decoded alone."""
    row = job.together.get_instance(job)
    if not isinstance(row, TableRow):
        return read_instance(row)
    target, *features = (np.frombuffer(each, f"<{row.code}") for each in row.series)
    found: Any = features
    return Instance(row.start, target, list(row.cat) or None, found or None, row.item_id, names=list(row.names) or None)


def read_columns(columns: RowColumns, places: Sequence[int]) -> ForecastColumns | None:
    """The rows at these places of a call as arrays; None where their series differ in length."""
    head = columns.head
    if any(len(sizes) > 1 for sizes in head.sizes):
        return None
    where, arrays = select_places(places), list[Any]()
    for (size,), raw in zip(head.sizes, columns.series, strict=True):
        if not size:
            return None
        arrays.append(np.frombuffer(raw, f"<{head.code}").reshape(-1, size)[where])
    starts = head.starts * len(places) if len(head.starts) == 1 else [head.starts[i] for i in places]
    item_ids = [head.item_ids[i] for i in places] if head.item_ids else [None] * len(places)
    cats = np.zeros((len(places), 0), np.int64)
    if head.cats:
        cats = np.array([head.cats[i] for i in places], np.int64).reshape(len(places), -1)
    target, *series = arrays
    return ForecastColumns(starts, item_ids, target, series, cats, head.names)

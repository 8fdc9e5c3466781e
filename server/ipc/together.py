"""A call for many models as one request between a front and a worker, and its answers as one response. Pure.

The body of the request is a head and the instances of the items, that of the response a head and the items' answers, in
the same order. Each item is queued, leased, counted, answered or refused in the worker as if it had come alone.

What many items share is said once: rows of a table come column by column, and so do forecasts that were computed
together (`NumbersBlock`); what happened to items alike is one `SharedAnswer`.

A head is a u32 (little-endian) with its length and one msgpack array. INVARIANT: fronts and workers of one server are
of one version, and only they speak this; all lengths are checked all the same.
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Generic, NamedTuple, TypeAlias, TypeVar, cast

import msgspec
from msgspec import Struct

from server.errors import Situation
from server.ipc.frames import CacheResult, Count, Tier, WireError
from server.ipc.packed import FLOAT_BYTES, ITEM_BYTES, ROW_BYTES, BlockRow, Buffer, Instance, NumbersBlock, TableRow

TOGETHER = "application/vnd.fleetcast.together"  #: the content type of both bodies
PREDICTION = "application/vnd.fleetcast.prediction"  #: an item's answer that is the prediction itself, without a frame
MOST_ITEMS = 1024  #: of one request
LENGTH = 4  #: bytes before a head

_encode = msgspec.msgpack.Encoder().encode
Head = TypeVar("Head", bound=Struct)
T = TypeVar("T")


class AskedColumns(Struct, array_like=True, forbid_unknown_fields=True):
    """How the rows of a table lie in a body: all rows' targets, then all rows' first covariates, and so on.

    See `TableRow`. Of `starts` and of each series' `sizes` (in numbers) there is one where all rows have the same;
    `item_ids` and `cats` are empty where no row has any.
    """

    code: str
    names: list[str]
    starts: list[str]
    item_ids: list[str | None]
    cats: list[list[int]]
    sizes: list[list[Count]]


class AskedTogether(Struct, array_like=True, forbid_unknown_fields=True):
    """The head of a request: the items' models, and the bytes of their instances or how their rows lie.

    `most_bytes`: of all answers together; beyond it the call is refused. `numbers`: answers are wanted as blocks.
    """

    models: list[str]
    sizes: list[Count]
    configuration: bytes
    most_bytes: Count
    numbers: bool = False
    columns: AskedColumns | None = None


class RowColumns:
    """The `count` rows of a call as columns: what is said of them, and the bytes of each series."""

    def __init__(self, head: AskedColumns, series: Sequence[memoryview], count: int) -> None:
        self.head, self.series, self.count = head, series, count
        self._ends: list[list[int]] | None = None  # where each row ends in each series, in numbers

    def __repr__(self) -> str:
        """For example `<RowColumns of 1000 rows, 2 series>`."""
        return f"<RowColumns of {self.count} rows, {len(self.series)} series>"

    def measure(self, at: int) -> int:
        """The bytes that a row counts."""
        head = self.head
        numbers = sum(sizes[at] if len(sizes) == self.count else sizes[0] for sizes in head.sizes)
        return numbers * ITEM_BYTES[head.code] + ROW_BYTES

    def cut(self, at: int) -> TableRow:
        """A row by itself. Most are never wanted so: they are decoded as columns."""
        head, width, count = self.head, ITEM_BYTES[self.head.code], self.count
        series = [
            view[width * (ends[at - 1] if at else 0) : width * ends[at]]
            for view, ends in zip(self.series, self._find_ends(), strict=True)
        ]
        start = head.starts[at if len(head.starts) == count else 0]
        item_id, cat = head.item_ids[at] if head.item_ids else None, head.cats[at] if head.cats else []
        return TableRow(start, item_id, head.code, head.names, series, cat)

    def _find_ends(self) -> list[list[int]]:
        if self._ends is None:
            count = self.count
            self._ends = [[*accumulate(each if len(each) == count else each * count)] for each in self.head.sizes]
        return self._ends

    def measure_all(self, places: Sequence[int]) -> list[int]:
        """The bytes that each row at these places counts."""
        width, count = ITEM_BYTES[self.head.code], self.count
        if all(len(sizes) == 1 for sizes in self.head.sizes):
            return [self.measure(0)] * len(places)
        chosen = ([each[at] for at in places] if len(each) == count else each * len(places) for each in self.head.sizes)
        return [sum(numbers) * width + ROW_BYTES for numbers in zip(*chosen, strict=True)]

    def select(self, places: Sequence[int]) -> "RowColumns":
        """The rows at these places, which ascend. Of rows that follow each other no number is copied."""
        first, count = places[0], len(places)
        if count == self.count:
            return self
        head, width, views = self.head, ITEM_BYTES[self.head.code], list[memoryview]()
        for view, ends in zip(self.series, self._find_ends(), strict=True):
            borders = [0, *(width * end for end in ends)]
            if places[-1] - first + 1 == count:
                views.append(view[borders[first] : borders[first + count]])
            else:
                views.append(memoryview(b"".join([view[borders[at] : borders[at + 1]] for at in places])))

        def pick(values: list[T]) -> list[T]:
            return [values[at] for at in places] if len(values) == self.count else values

        starts, sizes = say_once(pick(head.starts)), [say_once(pick(each)) for each in head.sizes]
        item_ids = pick(head.item_ids)
        if item_ids.count(None) == count:
            item_ids = []
        return RowColumns(AskedColumns(head.code, head.names, starts, item_ids, pick(head.cats), sizes), views, count)


class AskedBody(NamedTuple):
    """What is asked: the head, and the instance of each item, or columns where these are rows."""

    head: AskedTogether
    instances: list[memoryview]
    columns: RowColumns | None


class SharedAnswer(Struct, array_like=True, forbid_unknown_fields=True, gc=False, frozen=True):
    """What came of one item or several alike; see `server.ipc.frames.Response`."""

    situation: Situation
    cache: CacheResult
    tier: Tier
    content_type: str
    queue_us: Count
    load_us: Count
    inference_us: Count
    quality: str = ""
    warnings: str = ""


class BlockHead(Struct, array_like=True, forbid_unknown_fields=True):
    """See `NumbersBlock`. `places`: the items whose forecasts they are."""

    start: str
    steps: Count
    has_mean: bool
    levels: list[str]
    places: list[Count]


class AnsweredTogether(Struct, array_like=True, forbid_unknown_fields=True):
    """The head of a response. `of`: each item's place in `shared`; `sizes`: bytes of what is the item's alone."""

    shared: list[SharedAnswer]
    of: list[Count]
    sizes: list[Count]
    blocks: list[BlockHead]


Answer: TypeAlias = bytes | BlockRow


class _HeadReader(Generic[Head]):
    def __init__(self, kind: type[Head]) -> None:
        self._decode = msgspec.msgpack.Decoder(kind).decode

    def split(self, body: bytes) -> tuple[Head, memoryview]:
        """The head and what follows it. Raises WireError."""
        view = memoryview(body)
        end = LENGTH + int.from_bytes(view[:LENGTH], "little")
        if len(view) < LENGTH or end > len(view):
            raise WireError(f"a call of {len(view)} bytes has no head of {end - LENGTH} bytes")
        try:
            return self._decode(view[LENGTH:end]), view[end:]
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise WireError(f"the head of a call: {error}") from error


_asked, _answered = _HeadReader(AskedTogether), _HeadReader(AnsweredTogether)


# --- requests -----------------------------------------------------------------------------------------------------


def write_asked(head: AskedTogether, instances: Sequence[Instance] | RowColumns) -> bytes:
    """The body of a request. Its instances are all JSON, of `head.sizes`, or all rows of one table."""
    if isinstance(instances, RowColumns):
        head.sizes, head.columns = [], instances.head
        packed = _encode(head)
        return b"".join((len(packed).to_bytes(LENGTH, "little"), packed, *instances.series))
    parts: Sequence[Buffer] = cast("Sequence[Buffer]", instances)
    if instances and isinstance(instances[0], TableRow):
        rows = cast("Sequence[TableRow]", instances)
        head.sizes, head.columns = [], _describe_rows(rows)
        parts = [part for series in zip(*[row.series for row in rows], strict=True) for part in series]
    packed = _encode(head)
    return b"".join((len(packed).to_bytes(LENGTH, "little"), packed, *parts))


def _describe_rows(rows: Sequence[TableRow]) -> AskedColumns:
    first = rows[0]
    width = ITEM_BYTES[first.code]
    starts = [row.start for row in rows]
    item_ids = [row.item_id for row in rows]
    cats = [list(row.cat) for row in rows] if first.cat else []
    sizes = [[len(part) // width for part in series] for series in zip(*[row.series for row in rows], strict=True)]
    no_ids = item_ids.count(None) == len(item_ids)
    return AskedColumns(
        first.code, list(first.names), say_once(starts), [] if no_ids else item_ids, cats, [*map(say_once, sizes)]
    )


def say_once(values: list[T]) -> list[T]:
    """One value where all are the same."""
    return values[:1] if values.count(values[0]) == len(values) else values


def read_asked(body: bytes) -> AskedBody:
    """What a request asks. Raises WireError."""
    head, rest = _asked.split(body)
    count = len(head.models)
    if not 1 <= count <= MOST_ITEMS or len(head.sizes) != (0 if head.columns else count):
        raise WireError(f"a call of {count} models and {len(head.sizes)} instances")
    if head.columns is None:
        return AskedBody(head, list(_cut(rest, head.sizes)), None)
    return AskedBody(head, [], _read_columns(head.columns, rest, count))


def _read_columns(head: AskedColumns, rest: memoryview, count: int) -> RowColumns:
    """Cut the columns of a body. Raises WireError where their numbers do not fit."""
    width = ITEM_BYTES.get(head.code, 0)
    counts = [len(head.starts), *map(len, head.sizes)]
    is_whole = {1, count}.issuperset(counts) and {0, count}.issuperset((len(head.item_ids), len(head.cats)))
    if not width or not head.sizes or not is_whole:
        raise WireError(f"the columns of {count} rows do not have as many values")
    wholes = [width * (sizes[0] * count if len(sizes) == 1 else sum(sizes)) for sizes in head.sizes]
    return RowColumns(head, list(_cut(rest, wholes)), count)


# --- responses ----------------------------------------------------------------------------------------------------


def write_answered(
    shared: Sequence[SharedAnswer],
    of: Sequence[int],
    bodies: Sequence[Answer],
    whole: Sequence[tuple[NumbersBlock, Sequence[int]]] = (),
) -> bytes:
    """The body of a response: for each item its place in `shared`, and its answer or why there is none.

    `whole`: blocks of which all rows are answers, and the places of their items, which have an empty body.
    """
    own = [b"" if isinstance(body, BlockRow) else body for body in bodies]
    blocks: dict[int, tuple[NumbersBlock, list[int], list[int]]] = {}
    for place, body in enumerate(bodies) if sum(len(items) for _, items in whole) < len(bodies) else ():
        if isinstance(body, BlockRow):
            _, places, rows = blocks.setdefault(id(body.block), (body.block, [], []))
            places.append(place)
            rows.append(body.at)
    heads, parts = list[BlockHead](), list[Buffer](own)
    for block, items in whole:
        heads.append(BlockHead(block.start, block.steps, block.has_mean, list(block.levels), list(items)))
        parts += block.columns
    for block, places, rows in blocks.values():
        heads.append(BlockHead(block.start, block.steps, block.has_mean, list(block.levels), places))
        size = block.steps * FLOAT_BYTES
        if rows == [*range(len(rows))] and all(len(column) == len(rows) * size for column in block.columns):
            parts += block.columns  # all of them, as mostly
        else:
            parts += [memoryview(column)[row * size : (row + 1) * size] for column in block.columns for row in rows]
    packed = _encode(AnsweredTogether(list(shared), list(of), [*map(len, own)], heads))
    return b"".join((len(packed).to_bytes(LENGTH, "little"), packed, *parts))


def read_answered(body: bytes, count: int) -> list[tuple[SharedAnswer, memoryview | NumbersBlock]]:
    """What came of each of `count` items, and its answer. Raises WireError.

    Items that a block answers are its rows in their order: it is the answer of each.
    """
    head, rest = _answered.split(body)
    if not len(head.of) == len(head.sizes) == count:
        raise WireError(f"{count} items are answered by {len(head.of)}")
    if max(head.of, default=0) >= len(head.shared):
        raise WireError("an item is answered by nothing")
    columns = [
        len(block.places) * block.steps * FLOAT_BYTES
        for block in head.blocks
        for _ in range(len(block.levels) + block.has_mean)
    ]
    own = len(head.sizes) if any(head.sizes) else 0
    parts = list(_cut(rest, [*head.sizes[:own], *columns]))
    bodies: list[memoryview | NumbersBlock] = [*parts[:own]] or [memoryview(b"")] * count
    _check_places(head.blocks, count)
    at = own
    for each in head.blocks:
        end = at + len(each.levels) + each.has_mean
        block = NumbersBlock(each.start, each.steps, each.has_mean, each.levels, _order_rows(each, parts[at:end]))
        at = end
        for place in each.places:
            bodies[place] = block
    shared = head.shared
    return list(zip([shared[i] for i in head.of], bodies, strict=True))


def _check_places(blocks: Sequence[BlockHead], count: int) -> None:
    """Raises WireError where blocks answer an item twice, or one that there is not."""
    places = [place for block in blocks for place in block.places]
    if len(set(places)) < len(places) or max(places, default=0) >= count:
        raise WireError(f"blocks answer an item twice, or more than {count} items")


def _order_rows(head: BlockHead, columns: Sequence[memoryview]) -> Sequence[Buffer]:
    """The columns of a block, their rows in the order of the items: mostly they are."""
    places, size = head.places, head.steps * FLOAT_BYTES
    if places == sorted(places):
        return columns
    rows = sorted(range(len(places)), key=places.__getitem__)
    return [b"".join([column[row * size : (row + 1) * size] for row in rows]) for column in columns]


def _cut(view: memoryview, sizes: Sequence[int]) -> Iterator[memoryview]:
    """Cut a body into parts of these sizes. Raises WireError unless they are all of it."""
    if sum(sizes) != len(view):
        raise WireError(f"parts of {sum(sizes)} bytes together do not make {len(view)} bytes")
    for end, size in zip(accumulate(sizes), sizes, strict=True):
        yield view[end - size : end]

"""Pool and engine of a device with memory of its own: the counterpart of `memory_pool` and `cpu`.

The worker's step thread owns it. The pool's copies in and out run on the load stream beside a step.

INVARIANT: steps and moves wait for the copies launched before them, and copies wait for the moves launched before them.
A step's rows stay leased until its event is done, which `run` waits for. So no work reads a freed row when it is
written again.
"""

from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import structlog
import torch

from handlers.base import Family, Float32
from server.worker.engine.capture import HostReads, NotCapturable
from server.worker.engine.device import Device, Event
from server.worker.engine.memory_pool import ALIGN_BYTES

STAGING_BYTES = 256 * 1024 * 1024  #: most bytes of the rows of one forward
#: Bytes of staging of all families together, beyond which the least recently used family's is freed.
MAX_STAGING_BYTES = 1024 * 1024 * 1024
LANES = 2  #: forwards in flight: the host fills the inputs of the second one while the first runs
EAGER_RUNS = 3  #: runs of a family and bucket before a graph is captured
MAX_GRAPHS = 64
MOST_PLAIN = 1024  #: families that are remembered as not to be captured: an archive's author chooses its family

_FLOATS = ALIGN_BYTES // 4  # between two possible row starts

log = structlog.get_logger()


class DevicePool:
    """`budget_bytes` of device memory, allocated at once. Raises torch.OutOfMemoryError."""

    def __init__(self, budget_bytes: int, device: Device) -> None:
        self.device = device
        self.floats = device.memory(budget_bytes // ALIGN_BYTES * _FLOATS)
        self.copied: Event | None = None  #: event of the last copy in or out
        self._moved: Event | None = None
        self._sources: deque[tuple[Event, torch.Tensor]] = deque()  # host memory that copies still read
        self._views: dict[int, torch.Tensor] = {}

    def __repr__(self) -> str:
        """For example `<DevicePool 512.0 MB on cuda:0>`."""
        return f"<DevicePool {self.floats.numel() * 4 / 1e6:.1f} MB on {self.device.where}>"

    def write(self, offset: int, row: Float32) -> None:
        """Copy a row's numbers to `offset` (bytes). INVARIANT: the caller does not change `row` afterwards."""
        source = torch.from_numpy(row)
        self.copied = self.device.copy(self._row(offset, row.nbytes), source, after=self._moved)
        self._sources.append((self.copied, source))
        while self._sources[0][0].query() and len(self._sources) > 1:
            self._sources.popleft()

    def keep(self, offset: int, target: torch.Tensor) -> None:
        """Copy a row's numbers to host memory, before anything else is written to their place."""
        self.copied = self.device.copy(target, self._row(offset, target.numel() * 4), after=self._moved)

    def move(self, source: int, target: int, size: int) -> None:
        """Copy `size` bytes between two places that do not overlap."""
        to, origin = self._row(target, size), self._row(source, size)
        self._moved = self.device.launch(lambda: to.copy_(origin), after=self.copied)

    def read(self, offset: int, size: int) -> Float32:
        """A copy of a row's numbers on the host, for tests and checks."""
        target = self.device.host(size // 4)
        self.keep(offset, target)
        assert self.copied is not None
        self.copied.synchronize()
        found: Float32 = target.numpy().copy()
        return found

    def gather(self, index: torch.Tensor, out: torch.Tensor) -> None:
        """Copy the rows at `index` (in units of 64 bytes) to `out` [n, row_floats]; to be called in launched work."""
        width = out.shape[1]
        view = self._views.get(width)
        if view is None:
            starts = (self.floats.numel() - width) // _FLOATS + 1
            view = self._views[width] = self.floats.as_strided((starts, width), (_FLOATS, 1))
        torch.index_select(view, 0, index, out=out)

    def _row(self, offset: int, size: int) -> torch.Tensor:
        return self.floats[offset // 4 : (offset + size) // 4]


class StagingLane:
    """Page-locked host memory of one forward in flight: its inputs, the places of its rows, and its answers."""

    def __init__(self, family: Family, capacity: int, device: Device) -> None:
        self.x = device.host(capacity, *family.input_shape)
        self.index = device.host(capacity, dtype=torch.int64)
        self.out = device.host(capacity, *family.output_shape)
        self._x: Float32 = self.x.numpy()
        self._index = self.index.numpy()
        self._out: Float32 = self.out.numpy()
        self.done: Event | None = None

    def __repr__(self) -> str:
        """For example `<StagingLane of 512 rows, idle>`."""
        return f"<StagingLane of {len(self.x)} rows, {'idle' if self.done is None else 'in flight'}>"

    def fill(self, offsets: Sequence[int], parts: Sequence[Float32], bucket: int) -> None:
        """Write the next forward's inputs and the offsets of its rows, padded to `bucket` rows by the first offset."""
        assert self.done is None, "its last answers have been taken"
        at = 0
        for part in parts:
            self._x[at : at + len(part)] = part
            at += len(part)
        self._index[:at] = offsets
        self._index[at:bucket] = offsets[0]
        self._index[:bucket] //= ALIGN_BYTES

    def read_answers(self, answers: Float32) -> None:
        """Wait for the forward and copy its answers out."""
        assert self.done is not None, "it was launched"
        self.done.synchronize()
        self.done = None
        answers[...] = self._out[: len(answers)]


class DeviceStaging:
    """A family's fixed memory for forwards of powers of two of rows. A forward or its graph reads no other memory."""

    def __init__(self, family: Family, max_rows: int, device: Device, *, bf16: bool) -> None:
        self.family = family
        self.capacity = max(1, min(max_rows, STAGING_BYTES // (family.row_floats * 4)))
        self.rows = device.memory(self.capacity, family.row_floats)
        self.x = device.memory(self.capacity, *family.input_shape)
        self.index = device.memory(self.capacity, dtype=torch.int64)
        self.lanes = [StagingLane(family, self.capacity, device) for _ in range(LANES)]
        self.nbytes = self.rows.nbytes + self.x.nbytes
        self._device, self._bf16 = device, bf16
        self._forwards: dict[int, Callable[[], torch.Tensor]] = {}
        device.launch(self.x.zero_)  # so that padding rows read finite numbers from the first step on

    def __repr__(self) -> str:
        """For example `<DeviceStaging tcn-4f1c2a9b, 512 rows>`."""
        return f"<DeviceStaging {self.family.key}, {self.capacity} rows>"

    def bucket_size(self, rows: int) -> int:
        """The padded number of rows of a forward: the next power of two, at most the capacity."""
        return min(self.capacity, 1 << (rows - 1).bit_length())

    def forward(self, bucket: int) -> Callable[[], torch.Tensor]:
        """The family's forward over the first `bucket` rows of staging; to be called in launched work."""
        found = self._forwards.get(bucket)
        if found is None:
            bound: list[Callable[[], torch.Tensor]] = []  # made on the compute stream, which zeroes scratch
            self._device.launch(lambda: bound.append(self._bind_bucket(bucket))).synchronize()
            found = self._forwards[bucket] = bound[0]
        return found

    def _bind_bucket(self, bucket: int) -> Callable[[], torch.Tensor]:
        family, rows, x = self.family, self.rows[:bucket], self.x[:bucket]
        if not self._bf16:
            weights = family.bind(rows)
            return lambda: family.forward(weights, x)
        short = rows.to(torch.bfloat16)
        short_weights = family.bind(short)

        def forward() -> torch.Tensor:
            short.copy_(rows)
            return family.forward(short_weights, x).float()

        return forward

    def cut_batch(self, offsets: Sequence[int], parts: Sequence[Float32]) -> Iterator[tuple[list[int], list[Float32]]]:
        """Cut the batch into forwards that fit: for each the offsets of its rows, and pieces of the parts."""
        starts: list[int] = []
        pieces: list[Float32] = []
        for offset, part in zip(offsets, parts, strict=True):
            left = part
            while len(left):
                piece = left[: self.capacity - len(starts)]
                starts += [offset] * len(piece)
                pieces.append(piece)
                left = left[len(piece) :]
                if len(starts) == self.capacity:
                    yield starts, pieces
                    starts, pieces = [], []
        if starts:
            yield starts, pieces


class DeviceEngine:
    """Runs batches on a device pool. Keeps each family's staging, and graphs of frequent batch sizes."""

    def __init__(self, pool: DevicePool, max_rows: int, *, bf16: bool = False) -> None:
        self.pool = pool
        self._device, self._max_rows, self._bf16 = pool.device, max_rows, bf16
        self._staging: OrderedDict[str, DeviceStaging] = OrderedDict()  # the least recently used first
        self._graphs: OrderedDict[tuple[str, int], Callable[[], torch.Tensor]] = OrderedDict()
        self._runs: Counter[tuple[str, int]] = Counter()
        self._plain = dict[str, str]()  # why a family's forwards are not captured, for good

    def __repr__(self) -> str:
        """For example `<DeviceEngine <DevicePool 512.0 MB on cuda:0>, 2 families, 7 graphs>`."""
        return f"<DeviceEngine {self.pool!r}, {len(self._staging)} families, {len(self._graphs)} graphs>"

    def run(self, family: Family, offsets: Sequence[int], parts: Sequence[Float32]) -> list[Float32]:
        """Answers [n, *output_shape] for each request's array [n, *input_shape] under the row at its offset (bytes).

        INVARIANT: it returns or raises only when the device does not use the rows any more. Raises
        torch.OutOfMemoryError.
        """
        answers = np.empty((sum(map(len, parts)), *family.output_shape), np.float32)
        try:
            self._run(family, offsets, parts, answers)
        except BaseException:
            self._device.drain()  # otherwise a row could be freed while launched work still reads it
            for lane in self._staging[family.key].lanes if family.key in self._staging else ():
                lane.done = None
            raise
        return np.split(answers, np.cumsum([len(part) for part in parts])[:-1])

    def probe(self, family: Family, row: Float32, x: Float32) -> Float32:
        """Answers [n, *output_shape] of a model that has no slot yet, in scratch memory."""
        found = self._device.host(len(x), *family.output_shape)
        kind = torch.bfloat16 if self._bf16 else torch.float32

        def work() -> None:
            block = torch.from_numpy(np.repeat(row[None], len(x), axis=0)).to(self._device.where, kind)
            answer = family.forward(family.bind(block), torch.from_numpy(x).to(self._device.where))
            found.copy_(answer.float())

        self._device.launch(work).synchronize()
        answers: Float32 = found.numpy().copy()
        return answers

    def learn(self) -> bool:
        """No-op: a device gathers at its memory's bandwidth and replays one graph for a whole batch."""
        return False

    def trim(self) -> None:
        """Free what later steps can make again: graphs, staging, cached memory."""
        self._graphs.clear()
        self._runs.clear()
        self._staging.clear()
        self._device.trim()

    def _run(self, family: Family, offsets: Sequence[int], parts: Sequence[Float32], answers: Float32) -> None:
        staging = self._staging.get(family.key)
        if staging is None:
            staging = DeviceStaging(family, self._max_rows, self._device, bf16=self._bf16)
            self._staging[family.key] = staging
            self._forget_families()
        self._staging.move_to_end(family.key)
        flying: deque[tuple[StagingLane, Float32]] = deque()
        at = 0
        for i, (starts, pieces) in enumerate(staging.cut_batch(offsets, parts)):
            if len(flying) == LANES:
                lane, target = flying.popleft()
                lane.read_answers(target)
            lane = staging.lanes[i % LANES]
            self._launch(staging, lane, starts, pieces)
            flying.append((lane, answers[at : at + len(starts)]))
            at += len(starts)
        for lane, target in flying:
            lane.read_answers(target)

    def _forget_families(self) -> None:
        """Free the staging of families that have not run for long, with the graphs that read it; not the newest's.

        No forward of another family is in flight: `run` returns only when its own are done.
        """
        held = sum(staging.nbytes for staging in self._staging.values())
        while held > MAX_STAGING_BYTES and len(self._staging) > 1:
            gone, staging = self._staging.popitem(last=False)
            held -= staging.nbytes
            for runs in (self._graphs, self._runs):
                for key in [key for key in runs if key[0] == gone]:
                    del runs[key]

    def _launch(
        self, staging: DeviceStaging, lane: StagingLane, offsets: Sequence[int], parts: Sequence[Float32]
    ) -> None:
        """Launch one forward: copy inputs in, gather rows, run, copy answers out."""
        rows, bucket = len(offsets), staging.bucket_size(len(offsets))
        lane.fill(offsets, parts, bucket)
        forward = self._forward(staging, bucket)

        def work() -> None:
            staging.x[:rows].copy_(lane.x[:rows], non_blocking=True)
            staging.index[:bucket].copy_(lane.index[:bucket], non_blocking=True)
            self.pool.gather(staging.index[:bucket], staging.rows[:bucket])
            lane.out[:rows].copy_(forward()[:rows], non_blocking=True)

        lane.done = self._device.launch(work, after=self.pool.copied)

    def _forward(self, staging: DeviceStaging, bucket: int) -> Callable[[], torch.Tensor]:
        """The graph of this family and bucket. The plain forward for its first runs, or if it cannot be captured.

        The last run before a capture is watched: work for which the host waits is never captured, because a capture
        that fails is costly to contain.
        """
        key = staging.family.key, bucket
        known = self._graphs.get(key)
        if known is not None:
            self._graphs.move_to_end(key)
            return known
        forward = staging.forward(bucket)
        if staging.family.key in self._plain:
            return forward
        self._runs[key] += 1
        if self._runs[key] < EAGER_RUNS:
            return forward
        if self._runs[key] == EAGER_RUNS:
            return lambda: self._watch(staging.family, forward)
        try:
            self._graphs[key] = self._device.graph(forward)
        except NotCapturable as error:
            self._run_plainly(staging.family, str(error))
            return forward
        del self._runs[key]
        if len(self._graphs) > MAX_GRAPHS:
            self._graphs.popitem(last=False)
        return self._graphs[key]

    def _watch(self, family: Family, forward: Callable[[], torch.Tensor]) -> torch.Tensor:
        with HostReads(self._device.where) as watch:
            answer = forward()
        if watch.found:
            self._run_plainly(family, f"{watch.found} waits for the device or reads the host's memory")
        return answer

    def _run_plainly(self, family: Family, why: str) -> None:
        """Capture no forward of this family any more; outlives `trim`."""
        log.warning("runs_without_graph", family=family.key, error=why)
        if len(self._plain) >= MOST_PLAIN:
            self._plain.clear()
        self._plain[family.key] = why

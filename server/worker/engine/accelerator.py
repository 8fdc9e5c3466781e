"""Pool and engine of a device with memory of its own: the counterpart of `memory_pool` and `cpu`.

The worker's step thread owns it. The pool's copies in and out run on the load stream beside a step.

INVARIANT: steps and moves wait for the copies launched before them, and copies wait for the moves launched before them.
A step's rows stay leased until its event is done, which `run` waits for. So no work reads a freed row when it is
written again.
"""

from collections import OrderedDict, deque
from collections.abc import Sequence

import numpy as np
import structlog
import torch

from handlers.base import Family, Float32
from server.worker.engine.batch_inputs import Index, LaneInputs
from server.worker.engine.device import Device, Event
from server.worker.engine.device_errors import is_lost
from server.worker.engine.graphs import Graphs
from server.worker.engine.memory_pool import ALIGN_BYTES
from server.worker.engine.staging import LANES, DeviceStaging, StagingLane, StagingMemory, count_capacity, count_floats
from server.worker.engine.work_memory import measure_work

#: Bytes of scratch and graphs of all families, beyond which the least recently used family's are freed.
MAX_KEPT_BYTES = 512 * 1024 * 1024
WARM_ROWS = (1, 64)  #: of the forwards by which a family's kernels are loaded before its first request
MOST_FAMILIES = 1024  #: that wait for that, and that have staging: an archive's author chooses its family

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


class DeviceEngine:
    """Runs batches on a device pool. Keeps each family's staging, and graphs of frequent batch sizes."""

    def __init__(self, pool: DevicePool, max_rows: int, *, bf16: bool = False) -> None:
        self.pool = pool
        self._device, self._bf16 = pool.device, bf16
        self._memory = StagingMemory(max_rows, self._device)
        self._staging: OrderedDict[str, DeviceStaging] = OrderedDict()  # the least recently used first
        self.graphs = Graphs(self._device)
        self._expected = dict[str, Family]()  # families that were loaded and have not run
        self._opened: LaneInputs | None = None  # what `open_batch` gave last
        self._keeps_too_much = False  # because the newest family does

    def __repr__(self) -> str:
        """For example `<DeviceEngine <DevicePool 512.0 MB on cuda:0>, 2 families, 7 graphs>`."""
        return f"<DeviceEngine {self.pool!r}, {len(self._staging)} families, {len(self.graphs)} graphs>"

    def open_batch(self, family: Family) -> LaneInputs:
        """The inputs of the family's next batch, to be decoded into; they are in use until the next call.

        They are arrays where the family has no staging yet, whose size takes a while to find.
        """
        staging = self._staging.get(family.key)
        lanes = () if staging is None else [lane.inputs for lane in staging.lanes]
        self._opened = LaneInputs(family.read_shape, lanes)
        return self._opened

    def run(self, family: Family, offsets: Sequence[int], parts: Sequence[Float32] | LaneInputs) -> Sequence[Float32]:
        """Answers [n, *output_shape] for each request's array [n, *input_shape] under the row at its offset (bytes).

        The inputs of `open_batch` are in their place already; other arrays are copied there. An array may have rows of
        several models. Then `offsets` has one for each row of all arrays.

        INVARIANT: it returns or raises only when the device does not use the rows any more. Raises
        torch.OutOfMemoryError.
        """
        inputs = parts if isinstance(parts, LaneInputs) else LaneInputs.of(family, parts)
        starts = inputs.repeat(np.array(offsets, np.int64) // ALIGN_BYTES)
        answers = np.empty((len(starts), *family.output_shape), np.float32)
        try:
            self._run(family, starts, inputs, answers)
        except BaseException:
            self._device.drain()  # otherwise a row could be freed while launched work still reads it
            for lane in self._staging[family.key].lanes if family.key in self._staging else ():
                lane.done = None
            raise
        self._opened = None
        return inputs.split(answers)

    def probe(self, family: Family, row: Float32, x: Float32) -> Float32:
        """Answers [n, *output_shape] of a model that has no slot yet, in scratch memory, as much as a forward has."""
        answers = np.empty((len(x), *family.output_shape), np.float32)
        most = count_capacity(family, measure_work(family, bf16=self._bf16), self._memory.max_rows)
        for at in range(0, len(x), most):
            answers[at : at + most] = self._probe_rows(family, row, x[at : at + most])
        return answers

    def _probe_rows(self, family: Family, row: Float32, x: Float32) -> Float32:
        found = self._device.host(len(x), *family.output_shape)
        kind = torch.bfloat16 if self._bf16 else torch.float32

        def work() -> None:
            block = torch.from_numpy(np.repeat(row[None], len(x), axis=0)).to(self._device.where, kind)
            answer = family.forward(family.bind(block), torch.from_numpy(x).to(self._device.where))
            found.copy_(answer.float())

        self._device.launch(work).synchronize()
        answers: Float32 = found.numpy()
        return answers

    def measure(self, family: Family) -> None:
        """Find how much memory the family's forwards take. For the thread that loads its model: it takes a while."""
        measure_work(family, bf16=self._bf16)

    def expect(self, family: Family) -> None:
        """A model of this family was loaded: `learn` loads the family's kernels, unless a request comes first."""
        if family.key not in self._staging and len(self._expected) < MOST_FAMILIES:
            self._expected[family.key] = family

    def learn(self) -> bool:
        """Do the next thing that a request would else have to wait for: load kernels, watch or capture a forward.

        For idle time: it may take some tenths of a second. False if there is nothing to do.
        """
        try:
            found = self._warm_next() or self.graphs.prepare_next()
        except Exception as error:
            if is_lost(error):
                raise
            log.warning("not_prepared", error=str(error))
        else:
            if found:
                self._forget_families()
            return found
        # the error is gone here, and with its traceback what it used
        self._device.drain()
        self._device.trim()
        return True

    def trim(self) -> None:
        """Free what later steps can make again: graphs, staging, cached memory."""
        self._forget_all()
        self._memory = StagingMemory(self._memory.max_rows, self._device)
        self._device.trim()

    def _run(self, family: Family, starts: Index, inputs: LaneInputs, answers: Float32) -> None:
        staging = self._staging.get(family.key) or self._stage(family)
        self._staging.move_to_end(family.key)
        bindings = staging.bindings
        flying: deque[tuple[StagingLane, Float32]] = deque()
        at = 0
        for lane, rows in staging.fill_lanes(inputs):
            self._launch(staging, lane, starts[at : at + rows])
            flying.append((lane, answers[at : at + rows]))
            at += rows
            if len(flying) == LANES:  # the next forward's inputs are written to the lane of the first one
                first, target = flying.popleft()
                first.read_answers(target)
        for lane, target in flying:
            lane.read_answers(target)
        if staging.bindings != bindings or self._keeps_too_much:
            self._forget_families()

    def _stage(self, family: Family) -> DeviceStaging:
        """Give the family its views of the staging that all share; the staging grows for the largest family."""
        work = measure_work(family, bf16=self._bf16)
        floats = count_floats(family, count_capacity(family, work, self._memory.max_rows))
        if not self._memory.has_room(*floats):
            self._forget_all()
            self._memory.grow(*floats)
        if len(self._staging) >= MOST_FAMILIES:
            self._drop_family(next(key for key in self._staging if not self.graphs.captured(key)))
        staging = self._staging[family.key] = DeviceStaging(family, self._memory, work, self._device, bf16=self._bf16)
        self._expected.pop(family.key, None)
        return staging

    def _warm_next(self) -> bool:
        """Run a family that no request has asked for yet on zeros, so that its kernels are loaded."""
        if not self._expected:
            return False
        staging = self._stage(self._expected.pop(next(iter(self._expected))))
        for rows in WARM_ROWS:
            self._device.launch(lambda rows=rows: staging.run_on_zeros(rows)).synchronize()  # type: ignore[misc]
        return True

    def _forget_all(self) -> None:
        if self._opened is not None:  # it may run again, with other staging
            self._opened.leave_lanes()
            self._opened = None
        self.graphs.forget()
        self._staging.clear()

    def _forget_families(self) -> None:
        """Free scratch of families that have not run for long, but for that of graphs, which have a bound of their own.

        Not the newest's. No forward of another family is in flight: `run` returns only when its own are done.
        """
        captured = {key: self.graphs.captured(key) for key in self._staging}
        held = sum(staging.count_kept_bytes(captured[key]) for key, staging in self._staging.items())
        for key, staging in list(self._staging.items())[:-1]:
            if held <= MAX_KEPT_BYTES:
                break
            held -= staging.count_kept_bytes(captured[key])
            if captured[key]:
                staging.keep_only(captured[key])
                held += staging.count_kept_bytes(captured[key])
            else:
                self._drop_family(key)
        self._keeps_too_much = held > MAX_KEPT_BYTES

    def _drop_family(self, key: str) -> None:
        self.graphs.forget(key)
        del self._staging[key]

    def _launch(self, staging: DeviceStaging, lane: StagingLane, starts: Index) -> None:
        """Launch one forward: copy inputs in, gather the rows at `starts`, run, copy answers out."""
        rows, bucket = len(starts), staging.bucket_size(len(starts))
        lane.point_at(starts, bucket)
        forward = self.graphs.find_forward(staging, bucket)

        def work() -> None:
            staging.x[:rows].copy_(lane.x[:rows], non_blocking=True)
            if rows < bucket:  # padding is a real input: another family's numbers may be no legal index
                staging.x[rows:bucket].copy_(staging.x[:1].expand(bucket - rows, *staging.x.shape[1:]))
            staging.index[:bucket].copy_(lane.index[:bucket], non_blocking=True)
            self.pool.gather(staging.index[:bucket], staging.rows[:bucket])
            lane.out[:rows].copy_(forward()[:rows], non_blocking=True)

        lane.done = self._device.launch(work, after=self.pool.copied)

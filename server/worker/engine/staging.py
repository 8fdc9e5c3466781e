"""The fixed memory of forwards: one block on the device and two of the host's, which all families use in turn.

INVARIANT: one family's forwards are in flight at a time, because a run of the engine returns when its own are done. So
the memory of staging does not grow with the number of families. What grows with it, scratch and graphs, is counted.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import cycle
from math import prod

import torch

from handlers.base import Family, Float32
from server.worker.engine.batch_inputs import Index, LaneInputs
from server.worker.engine.device import Device, Event
from server.worker.engine.work_memory import WorkBytes

STAGING_BYTES = 256 * 1024 * 1024  #: most bytes of the rows and inputs of one forward, unless one row has more
LANE_BYTES = 64 * 1024 * 1024  #: most bytes of page-locked memory of one forward, unless one row has more
WORK_BYTES = 512 * 1024 * 1024  #: most bytes of scratch and temporaries of one forward, unless one row has more
LANES = 2  #: forwards in flight: the host fills the inputs of the second one while the first runs


class StagingMemory:
    """The blocks. They grow to powers of two, which page-locked memory is rounded up to anyway."""

    def __init__(self, max_rows: int, device: Device) -> None:
        self.max_rows, self._device = max_rows, device
        self.block, self.lanes = torch.empty(0), [torch.empty(0)] * LANES
        self.index: torch.Tensor | None = None
        self.lane_indices: list[torch.Tensor] = []

    def __repr__(self) -> str:
        """For example `<StagingMemory 256.0 MB, page-locked 2 x 64.0 MB>`."""
        lane = self.lanes[0].nbytes / 1e6
        return f"<StagingMemory {self.block.nbytes / 1e6:.1f} MB, page-locked {LANES} x {lane:.1f} MB>"

    def has_room(self, block_floats: int, lane_floats: int) -> bool:
        """Whether the blocks are as large as that."""
        return self.block.numel() >= block_floats and self.lanes[-1].numel() >= lane_floats

    def grow(self, block_floats: int, lane_floats: int) -> None:
        """Replace the blocks by larger ones. The caller has dropped everything that uses them.

        Raises torch.OutOfMemoryError; then there are no blocks, and the next call begins anew.
        """
        sizes = max(block_floats, self.block.numel()), max(lane_floats, self.lanes[-1].numel())
        self.block, self.lanes = torch.empty(0), [torch.empty(0)] * LANES  # freed before the larger ones are made
        if self.index is None:  # both or none, whichever kind of memory is short
            lane_indices = [self._device.host(self.max_rows, dtype=torch.int64) for _ in range(LANES)]
            self.index, self.lane_indices = self._device.memory(self.max_rows, dtype=torch.int64), lane_indices
        block_floats, lane_floats = (1 << (size - 1).bit_length() for size in sizes)
        block = self._device.memory(block_floats)
        self.lanes = [self._device.host(lane_floats) for _ in range(LANES)]
        self.block = block


def count_capacity(family: Family, work: WorkBytes, max_rows: int) -> int:
    """The rows of one forward whose staging, page-locked memory, scratch and temporaries are within their bounds."""
    given, answered = prod(family.read_shape) * 4, prod(family.output_shape) * 4
    rows = min(
        max_rows,
        STAGING_BYTES // (family.row_floats * 4 + given),
        LANE_BYTES // (given + answered),
        WORK_BYTES // max(1, work.bound + work.peak),
    )
    return max(1, rows)


class StagingLane:
    """Page-locked host memory of one forward in flight: its inputs, the places of its rows, and its answers.

    Of the inputs it has the steps that the family reads, so that no others travel.
    """

    def __init__(self, family: Family, capacity: int, memory: torch.Tensor, index: torch.Tensor) -> None:
        given, answered = capacity * prod(family.read_shape), capacity * prod(family.output_shape)
        self.x = memory[:given].view(capacity, *family.read_shape)
        self.index = index[:capacity]
        self.out = memory[given : given + answered].view(capacity, *family.output_shape)
        self.inputs: Float32 = self.x.numpy()
        self._index = self.index.numpy()
        self._out: Float32 = self.out.numpy()
        self.done: Event | None = None

    def __repr__(self) -> str:
        """For example `<StagingLane of 512 rows, idle>`."""
        return f"<StagingLane of {len(self.x)} rows, {'idle' if self.done is None else 'in flight'}>"

    def write(self, pieces: Sequence[Float32]) -> int:
        """Write the next forward's inputs, each [n, *input_shape] or their steps that are read; returns the rows."""
        assert self.done is None, "its last answers have been taken"
        at, steps = 0, self.inputs.shape[-1]
        for piece in pieces:
            self.inputs[at : at + len(piece)] = piece[..., -steps:]
            at += len(piece)
        return at

    def point_at(self, starts: Index, bucket: int) -> None:
        """Write where the next forward's rows start, padded to `bucket` rows by the first one."""
        assert self.done is None, "its last answers have been taken"
        self._index[: len(starts)] = starts
        self._index[len(starts) : bucket] = starts[0]

    def read_answers(self, answers: Float32) -> None:
        """Wait for the forward and copy its answers out."""
        assert self.done is not None, "it was launched"
        self.done.synchronize()
        self.done = None
        answers[...] = self._out[: len(answers)]


class DeviceStaging:
    """A family's view of staging, for forwards of powers of two of rows. Forwards and graphs read no other memory."""

    def __init__(self, family: Family, memory: StagingMemory, work: WorkBytes, device: Device, *, bf16: bool) -> None:
        """INVARIANT: the memory has room for `count_floats`."""
        assert memory.index is not None, "the memory has grown"
        self.family = family
        self.capacity = count_capacity(family, work, memory.max_rows)
        rows, given = self.capacity * family.row_floats, self.capacity * prod(family.read_shape)
        self.rows = memory.block[:rows].view(self.capacity, family.row_floats)
        self.x = memory.block[rows : rows + given].view(self.capacity, *family.read_shape)
        self.index = memory.index[: self.capacity]
        blocks = zip(memory.lanes, memory.lane_indices, strict=True)
        self.lanes = [StagingLane(family, self.capacity, *each) for each in blocks]
        self._device, self._bf16, self._work = device, bf16, work
        self._forwards: dict[int, Callable[[], torch.Tensor]] = {}

    def __repr__(self) -> str:
        """For example `<DeviceStaging tcn-4f1c2a9b, 512 rows>`."""
        return f"<DeviceStaging {self.family.key}, {self.capacity} rows>"

    def fill_lanes(self, inputs: LaneInputs) -> Iterator[tuple[StagingLane, int]]:
        """The batch's forwards in order: a lane with the inputs of each, and its rows.

        The caller has taken the answers of a lane before it asks for the forward that uses it again.
        """
        if inputs.is_staged:
            yield from ((lane, rows) for lane, rows in zip(self.lanes, inputs.filled, strict=False) if rows)
            return
        inputs.leave_lanes()
        for lane, pieces in zip(cycle(self.lanes), inputs.cut(self.capacity), strict=False):
            yield lane, lane.write(pieces)

    @property
    def bindings(self) -> int:
        """The number of buckets whose scratch it keeps."""
        return len(self._forwards)

    def count_kept_bytes(self, captured: Collection[int]) -> int:
        """The bytes that it keeps between runs, as measured for one row: scratch, and graphs' temporaries."""
        return sum(self._forwards) * self._work.bound + sum(captured) * self._work.peak

    def count_graph_bytes(self, bucket: int) -> int:
        """The bytes that a graph of this bucket keeps: the scratch of its binding, the temporaries of its forward."""
        return bucket * (self._work.bound + self._work.peak)

    def keep_only(self, captured: Collection[int]) -> None:
        """Free the scratch of all buckets but those of graphs."""
        self._forwards = {bucket: self._forwards[bucket] for bucket in captured}

    def clear(self, bucket: int) -> None:
        """Make rows and inputs zeros, which are legal for every family; to be called in launched work."""
        self.rows[:bucket].zero_()
        self.x[:bucket].zero_()

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

    def run_on_zeros(self, rows: int) -> None:
        """Run a forward whose binding is not kept; to be called in launched work."""
        bucket = self.bucket_size(min(rows, self.capacity))
        self.clear(bucket)
        self._bind_bucket(bucket)()

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


def count_floats(family: Family, capacity: int) -> tuple[int, int]:
    """The floats of so many rows in the block of the device, and in a block of the host's."""
    given, answered = prod(family.read_shape), prod(family.output_shape)
    return capacity * (family.row_floats + given), capacity * (given + answered)

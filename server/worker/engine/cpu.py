"""Computes one step on the CPU: runs a batch's inputs under the rows of many models. The worker's step thread owns it.

`server.worker.engine.execution_plan` cuts a batch into forwards by the family's measured times. A forward reads rows in
staging (gathered into fixed memory that is bound to parameter views once) or in the pool itself.

INVARIANT: no load, eviction or move happens during a forward, because the step thread does them too.
"""

import time
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import structlog
import torch

from handlers.base import Family, Float32
from handlers.kinds import run_row_on_cpu
from handlers.kinds.row_work import row_work
from server.worker.engine.batch_inputs import ALIGNED_BYTES, ListedInputs
from server.worker.engine.execution_plan import (
    MOST_ROWS,
    UNKNOWN,
    CostTable,
    Path,
    PathTimings,
    PlannedForward,
    plan_forwards,
)
from server.worker.engine.memory_pool import Pool

#: On the CPU a step is cut into forwards whose staging stays in cache (measured: 500 `tcn` models in 3.5 ms instead of
#: 5.5; 8 rows of the 1.8 MB `mlp` in 75 us a row instead of 130 for 16). A GPU has `server.worker.engine.accelerator`.
CPU_ROWS = 64
CPU_STAGING_BYTES = 8 * 1024 * 1024
CPU_INPUT_BYTES = 8 * 1024 * 1024  #: of one forward's inputs, and of what a binding keeps: both stay with the family
#: Rows in place whose binding is kept. A binding is views and scratch memory, valid for any row of the family at that
#: place; it takes two thirds of the time of a single 1.8 MB `mlp`.
BOUND_ROWS = 1024
BOUND_BYTES = 64 * 1024 * 1024  #: of scratch in a family's bindings, and in all of rows in place
#: Bytes of staging of all families together, beyond which the least recently used family's is freed; and families whose
#: measured times are kept. An archive's author chooses its family, so that there can be any number of them.
MAX_STAGING_BYTES, MAX_LEARNING = 256 * 1024 * 1024, 1024
VIEWS_BYTES = 16 * 1024  #: of one row of staging, in parameter views and scratch memory bound to it, about

LEARN_S = 0.002  #: seconds that the step thread measures paths at a time

log = structlog.get_logger()

Inputs = Float32 | Sequence[Float32]
Binding = tuple[torch.Tensor, Sequence[torch.Tensor]]


class Staging:
    """A family's fixed memory for one forward: rows and inputs, and the parameter views bound to them by batch size."""

    def __init__(self, family: Family, max_rows: int, device: torch.device) -> None:
        self.family = family
        work = row_work(family)
        #: Rows of one forward in any way: inputs of 100,000 steps would make staging of hundreds of MB.
        self.most = max(1, min(MOST_ROWS, CPU_INPUT_BYTES // (4 * max(1, work.given, work.scratch))))
        self.capacity = max(1, min(CPU_ROWS, max_rows, self.most, CPU_STAGING_BYTES // (family.row_floats * 4)))
        self._rows = torch.empty((self.capacity, family.row_floats), dtype=torch.float32, device=device)
        self._host = torch.empty((self.most, *family.read_shape), dtype=torch.float32)
        self._host_numpy: Float32 = self._host.numpy()
        self._bound: dict[int, Binding] = {}
        self._same: dict[int, Binding] = {}
        self._scratch_bytes = 4 * work.scratch  # of a row in a binding
        self._kept_bytes = 0  # of scratch in both
        self.nbytes = self._rows.nbytes + self._host.nbytes + VIEWS_BYTES * (self.capacity + MOST_ROWS)

    def __repr__(self) -> str:
        """For example `<Staging tcn-4f1c2a9b, 64 rows>`."""
        return f"<Staging {self.family.key}, {self.capacity} rows>"

    def stage_rows(self, count: int) -> Binding:
        """Staging of `count` rows, and its parameter views."""
        bound = self._bound.get(count)
        if bound is None:
            self._keep_scratch(count)
            block = self._rows[:count]
            bound = self._bound[count] = (block, self.family.bind(block))
        return bound

    def stage_same(self, count: int) -> Binding:
        """Staging of one row, and the parameter views of `count` rows that are all this row."""
        bound = self._same.get(count)
        if bound is None:
            self._keep_scratch(count)
            block = self._rows[:1]
            bound = self._same[count] = (block, self.family.bind(block.expand(count, -1)))
        return bound

    def _keep_scratch(self, count: int) -> None:
        """Make way for one more binding: those of all batch sizes together keep little."""
        self._kept_bytes += count * self._scratch_bytes
        if self._kept_bytes > BOUND_BYTES:
            self._bound.clear()
            self._same.clear()
            self._kept_bytes = count * self._scratch_bytes

    def stage_inputs(self, parts: Inputs) -> torch.Tensor:
        """The requests' arrays, each [n, *input_shape], concatenated in staging without the steps that are not read.

        One array is taken as it lies, where that is as it would lie in staging.
        """
        steps = self.family.read_shape[-1]
        if isinstance(parts, np.ndarray):
            lying = torch.from_numpy(parts)
            if parts.shape[-1] == steps and lying.is_contiguous() and lying.data_ptr() % ALIGNED_BYTES == 0:
                return lying
            parts = [parts]
        count = sum(map(len, parts))
        if self.family.read_shape != self.family.input_shape:
            parts = [part[..., -steps:] for part in parts]
        np.concatenate(parts, out=self._host_numpy[:count])
        return self._host[:count]


class Engine:
    """Runs batches on a pool. Keeps staging and measured times of each family that has run."""

    def __init__(self, pool: Pool, max_rows: int) -> None:
        self.pool = pool
        self._max_rows = max_rows
        self._staging: OrderedDict[str, Staging] = OrderedDict()  # the least recently used first
        self._in_place: OrderedDict[tuple[str, int, int], tuple[Sequence[torch.Tensor], float]] = OrderedDict()
        self._in_place_rows = 0.0  # a row counts as more than one where its scratch is large
        self._learning: OrderedDict[str, PathTimings] = OrderedDict()

    def __repr__(self) -> str:
        """For example `<Engine <Pool 512.0 MB on cpu>, 2 families>`."""
        return f"<Engine {self.pool!r}, {len(self._staging)} families>"

    def open_batch(self, family: Family) -> ListedInputs:  # noqa: ARG002 -- as a device's engine has it
        """The inputs of the family's next batch."""
        return ListedInputs()

    def run(self, family: Family, offsets: Sequence[int], parts: Sequence[Float32]) -> list[Float32]:
        """Answers [n, *output_shape] for each request's array [n, *input_shape] under the row at its offset (bytes).

        An array may have rows of several models. Then `offsets` has one for each row of all arrays. The last axis of
        the arrays may be as short as in `read_shape`.
        """
        staging = self._staging_of(family)
        sizes = [len(part) for part in parts]
        flat = _repeat_offsets(offsets, sizes)
        learning = self._learning[family.key]
        pieces = plan_forwards(learning.table, flat, family.row_floats * 4)
        began = time.perf_counter()
        if (
            len(pieces) == 1
            and len(flat) <= self._most_rows(staging, pieces[0].path)
            and isinstance(pieces[0].rows, range)
        ):
            answers = self._forward(staging, pieces[0].path, flat, parts)
        else:
            answers = self._run_forwards(staging, pieces, flat, _split_rows(parts, sizes))
        learning.record_batch(flat, time.perf_counter() - began)
        return _split_answers(answers, sizes)

    def probe(self, family: Family, row: Float32, x: Float32) -> Float32:
        """Answers [n, *output_shape] of a model that has no slot yet, in scratch memory."""
        return run_row_on_cpu(family, row, x)

    def learn(self) -> bool:
        """Time forwards of families that have run, for about LEARN_S. False if nothing has to be measured.

        The forwards run recently requested rows on zeros. Their answers are dropped, so it does not matter if a row has
        been evicted since.
        """
        until = time.perf_counter() + LEARN_S
        for key, learning in list(self._learning.items()):
            while key in self._staging and (forward := learning.next_timing()) is not None:
                (path, size), offsets = forward
                x = np.zeros((size, *self._staging[key].family.input_shape), np.float32)
                learning.record_timing(self._time_forward(self._staging[key], path, offsets, x))
                if time.perf_counter() > until:
                    return True
        return False

    def cost_table(self, family: Family) -> CostTable:
        """The measured times of the family's paths; an empty table if it has not run."""
        learning = self._learning.get(family.key)
        return learning.table if learning else CostTable()

    def use_costs(self, family: Family, table: CostTable) -> None:
        """Set the times of the family's paths, instead of measuring them."""
        self._staging_of(family)
        self._learning[family.key].table = table

    def trim(self) -> None:
        """Free what later steps can make again: staging and bindings."""
        self._staging.clear()
        self._unbind()

    def _run_forwards(
        self, staging: Staging, pieces: Sequence[PlannedForward], offsets: Sequence[int], rows: Inputs
    ) -> Float32:
        """Run a batch in several forwards. `rows`: each row's inputs [1, *input_shape], or all in one array."""
        answers = np.empty((len(rows), *staging.family.output_shape), np.float32)
        for path, places in pieces:
            most = self._most_rows(staging, path)
            for at in range(0, len(places), most):
                some = places[at : at + most]
                if isinstance(some, range):  # views, no index
                    where = slice(some.start, some.stop)
                    answers[where] = self._forward(staging, path, offsets[where], rows[where])
                    continue
                parts = rows[some] if isinstance(rows, np.ndarray) else [rows[i] for i in some]
                answers[some] = self._forward(staging, path, [offsets[i] for i in some], parts)
        return answers

    def _forward(self, staging: Staging, path: Path, offsets: Sequence[int], parts: Inputs) -> Float32:
        with torch.inference_mode():
            x = staging.stage_inputs(parts)
            if path is Path.IN_PLACE:
                weights = self._bind_block(staging.family, offsets[0], len(offsets))
            elif path is Path.REPEAT:
                block, weights = staging.stage_same(len(offsets))
                self.pool.gather(offsets[:1], block)
            else:
                block, weights = staging.stage_rows(len(offsets))
                self.pool.gather(offsets, block)
            answer: Float32 = staging.family.forward(weights, x).numpy()
        return answer

    def _bind_block(self, family: Family, offset: int, count: int) -> Sequence[torch.Tensor]:
        """The parameter views of `count` adjacent rows in the pool."""
        key = (family.key, offset, count)
        bound = self._in_place.get(key)
        if bound is not None:
            self._in_place.move_to_end(key)
            return bound[0]
        weights = family.bind(self.pool.block(offset, count, family.row_floats))
        weight = count * max(1.0, row_work(family).scratch * 4 * BOUND_ROWS / BOUND_BYTES)
        self._in_place[key] = weights, weight
        self._in_place_rows += weight
        while self._in_place_rows > BOUND_ROWS and len(self._in_place) > 1:
            _, (_, gone) = self._in_place.popitem(last=False)
            self._in_place_rows -= gone
        return weights

    def _time_forward(self, staging: Staging, path: Path, offsets: Sequence[int], x: Float32) -> float:
        """Seconds of this thread for one forward with its binding; UNKNOWN if the rows there cannot be run any more."""
        self._unbind()
        began = time.thread_time()
        try:
            self._run_forwards(staging, [PlannedForward(path, range(len(x)))], offsets, _split_rows([x], [len(x)]))
        except Exception as error:
            log.warning("path_not_measured", family=staging.family.key, path=str(path), error=str(error))
            return UNKNOWN
        return time.thread_time() - began

    def _unbind(self) -> None:
        self._in_place.clear()
        self._in_place_rows = 0.0

    def _staging_of(self, family: Family) -> Staging:
        staging = self._staging.get(family.key)
        if staging is None:
            staging = self._staging[family.key] = Staging(family, self._max_rows, self.pool.device)
            self._learning.setdefault(family.key, PathTimings(family.row_floats * 4))
            self._forget_families()
        self._staging.move_to_end(family.key)
        self._learning.move_to_end(family.key)
        return staging

    def _forget_families(self) -> None:
        """Free the staging of families that have not run for long, but not that of the newest."""
        held = sum(staging.nbytes for staging in self._staging.values())
        while held > MAX_STAGING_BYTES and len(self._staging) > 1:
            _, gone = self._staging.popitem(last=False)
            held -= gone.nbytes
        while len(self._learning) > MAX_LEARNING:
            self._learning.popitem(last=False)

    @staticmethod
    def _most_rows(staging: Staging, path: Path) -> int:
        """The most rows of one forward."""
        return staging.capacity if path is Path.GATHER else staging.most


def _split_answers(answers: Float32, sizes: Sequence[int]) -> list[Float32]:
    found, at = [], 0
    for size in sizes:
        found.append(answers[at : at + size])
        at += size
    return found


def _split_rows(parts: Sequence[Float32], sizes: Sequence[int]) -> Inputs:
    """Split arrays [n, *shape] into arrays [1, *shape]; one array is its rows already."""
    if len(parts) == 1:
        return parts[0]
    if len(sizes) == sum(sizes):
        return parts
    return [part[i : i + 1] for part, size in zip(parts, sizes, strict=True) for i in range(size)]


def _repeat_offsets(offsets: Sequence[int], sizes: Sequence[int]) -> Sequence[int]:
    """Repeat each offset for every row of its request, unless there is one for each row."""
    if len(offsets) == sum(sizes):
        return offsets
    return [offset for offset, size in zip(offsets, sizes, strict=True) for _ in range(size)]

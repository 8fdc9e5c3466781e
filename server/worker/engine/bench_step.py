"""Benchmarks a worker's step against simpler code: `python -m server.worker.engine.bench_step TCN MLP` prints JSON.

`loadtest.benchmarks.step` runs it and names the two peers as MODULE:CLASS. A peer is made of (family, state dicts of
all models) and answers (which [B], x [B, *input_shape]). Everything runs in one process and one thread, whose processor
time counts. The compared ways run in turn, in reverse order every other round, and the CPU's cache is swept before each
turn. All get what a step gets: the batch's models and each request's decoded row. To make one tensor of the rows is
part of the measured work.
"""

import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from statistics import fmean
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track

from handlers.base import Family, Float32
from handlers.forecasters import build_family, random_tensors
from server.worker.engine.bench_gpu import summarise_spread
from server.worker.engine.cpu import Engine
from server.worker.engine.execution_plan import plan_forwards
from server.worker.engine.memory_pool import Pool
from server.worker.engine.speed import count_flops, learn_costs, measure_core, one_thread

SEED = 7
SWEEP_BYTES = 256 * 1024 * 1024  #: written before each turn; with 64 MiB, the way that ran before was 14 % faster
CONFIG = {"features": 8, "context_length": 168, "prediction_length": 24, "quantiles": 5}

Peer = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
MakePeer = Callable[[Family, Sequence[Mapping[str, Float32]]], Peer]


@dataclass(frozen=True, slots=True)
class StepBenchSizes:
    """How much is measured. `answers`: the least number of answers in one measurement."""

    models: int = 500
    batches: tuple[int, ...] = (1, 8, 32, 64, 200, 500)
    hot: int = 4
    cold: int = 128
    large_batches: tuple[int, ...] = (1, 8, 64)
    repeated: int = 64
    answers: int = 512
    rounds: int = 15


@dataclass(frozen=True, slots=True)
class BenchBatch:
    """Requests of one decoded row each: `offsets` are their models for the engine, `which` the same for a peer."""

    offsets: Sequence[int]
    which: torch.Tensor
    parts: Sequence[Float32]


Way = Callable[[BenchBatch], list[Float32]]


class StepBench:
    """Models of one family in a pool, an engine with measured paths, an engine that only gathers, and a peer."""

    def __init__(self, family: Family, models: int, make: MakePeer) -> None:
        self.family, self.models = family, models
        self.row_bytes = family.row_floats * 4
        tensors = [random_tensors(family, SEED + model) for model in range(models)]
        pool = Pool(models * self.row_bytes, torch.device("cpu"))
        rows = [family.row(each) for each in tensors]
        for model, row in enumerate(rows):
            pool.write(model * self.row_bytes, row)
        self.flops, self.rates = count_flops(family, rows[0]), measure_core(models * self.row_bytes)
        self.peer = make(family, tensors)
        self.chosen, self.gathered = Engine(pool, 512), Engine(pool, 512)
        learn_costs(self.chosen, family, [model * self.row_bytes for model in range(models)])
        self._rng = np.random.default_rng(SEED)

    def __repr__(self) -> str:
        """For example `<StepBench of tcn-4f1c2a9b, 500 models>`."""
        return f"<StepBench of {self.family.key}, {self.models} models>"

    def draw_batches(self, size: int, answers: int) -> list[BenchBatch]:
        """Draw batches of `size` requests for random models, with at least `answers` requests in all."""
        return [
            self.make_batch(self._rng.integers(self.models, size=size).tolist()) for _ in range(-(-answers // size))
        ]

    def shuffle_models(self) -> list[int]:
        """Every model once, in random order."""
        return list(self._rng.permutation(self.models).tolist())

    def make_batch(self, models: Sequence[int]) -> BenchBatch:
        """A batch with one request for each of these models."""
        x = self._rng.standard_normal((len(models), *self.family.input_shape), dtype=np.float32)
        offsets = [model * self.row_bytes for model in models]
        return BenchBatch(offsets, torch.tensor(models), [row[None] for row in x])

    def compare_ways(self, batches: Sequence[BenchBatch], rounds: int, *names: str) -> dict[str, Any]:
        """Microseconds an answer of `fleetcast` and of the ways in `names` (`peer`, `gathered`), and the ratios.

        Raises AssertionError if their answers differ by more than 1e-5 + 1e-4 of the value.
        """
        ways = {
            "fleetcast": self._timed_by(self.chosen),
            "peer": self._by_peer,
            "gathered": self._timed_by(self.gathered),
        }
        named = {name: ways[name] for name in ("fleetcast", *names)}
        for batch in batches:
            for way in named.values():
                np.testing.assert_allclose(np.concatenate(way(batch)), self._by_peer(batch)[0], rtol=1e-4, atol=1e-5)
        us: dict[str, list[float]] = {name: [] for name in named}
        answers, sweep = sum(len(batch.offsets) for batch in batches), torch.zeros(SWEEP_BYTES // 4)
        for turn in range(rounds):
            for name in list(named)[:: 1 if turn % 2 else -1]:
                us[name].append(_time_sweep(named[name], batches, sweep) / answers * 1e6)
        ratios = {name: [a / b for a, b in zip(us["fleetcast"], us[name], strict=True)] for name in names}
        return {
            "us": {name: summarise_spread(taken) for name, taken in us.items()},
            "ratio": {name: summarise_spread(found) for name, found in ratios.items()},
            "floor_us": fmean(map(self._floor_us, batches)),
            "rates": {"flops_per_s": self.rates.flops, "copied_bytes_per_s": self.rates.bytes},
            "paths": dict(sum(map(self._count_paths, batches), Counter())),
        }

    def _timed_by(self, engine: Engine) -> Way:
        return lambda batch: engine.run(self.family, batch.offsets, batch.parts)

    def _by_peer(self, batch: BenchBatch) -> list[Float32]:
        with torch.inference_mode():
            return [self.peer(batch.which, torch.from_numpy(np.concatenate(batch.parts))).numpy()]

    def _floor_us(self, batch: BenchBatch) -> float:
        size = self.row_bytes * len(set(batch.offsets)) / len(batch.offsets)
        return self.rates.floor_s(self.flops, size) * 1e6

    def _count_paths(self, batch: BenchBatch) -> Counter[str]:
        """Count the rows by path."""
        pieces = plan_forwards(self.chosen.cost_table(self.family), batch.offsets, self.row_bytes)
        return sum((Counter({str(piece.path): len(piece.rows)}) for piece in pieces), Counter())


def measure_step(tcn: MakePeer, mlp: MakePeer, sizes: StepBenchSizes) -> dict[str, Any]:
    """Measure the small convolution by batch size, the large network hot and cold, and many inputs of one model."""
    found: dict[str, dict[str, Any]] = {}
    with one_thread():
        work = list(_list_comparisons(tcn, mlp, sizes))
        for section, row, bench, batches, names in track(work, "steps", console=Console(stderr=True), transient=True):
            found.setdefault(section, {})[row] = bench.compare_ways(batches, sizes.rounds, *names)
    return found


def _list_comparisons(
    tcn: MakePeer, mlp: MakePeer, sizes: StepBenchSizes
) -> Iterator[tuple[str, str, StepBench, Sequence[BenchBatch], tuple[str, ...]]]:
    """Each comparison: its section, its row there, its bench and batches, and the ways to compare."""
    small = StepBench(build_family("tcn", CONFIG), sizes.models, tcn)
    for size in sizes.batches:
        yield "tcn", str(size), small, small.draw_batches(size, sizes.answers), ("peer",)
    yield "tcn", "all", small, [small.make_batch(small.shuffle_models())], ("peer",)
    large = {count: StepBench(build_family("mlp", CONFIG), count, mlp) for count in (sizes.hot, sizes.cold)}
    for count, bench in large.items():
        for size in sizes.large_batches:
            yield f"mlp of {count}", str(size), bench, bench.draw_batches(size, sizes.answers), ("peer", "gathered")
    for name, bench in (("tcn", small), ("mlp", large[sizes.cold])):
        asked = bench.shuffle_models()[: -(-sizes.answers // sizes.repeated)]
        yield "one model", name, bench, [bench.make_batch([model] * sizes.repeated) for model in asked], ("gathered",)


def _time_sweep(way: Way, batches: Sequence[BenchBatch], sweep: torch.Tensor) -> float:
    sweep.add_(1.0)
    started = time.thread_time()
    for batch in batches:
        way(batch)
    return time.thread_time() - started


def import_peer(peer: str) -> MakePeer:
    """Import the peer MODULE:CLASS. Raises ImportError, AttributeError."""
    module, _, name = peer.partition(":")
    found: MakePeer = getattr(import_module(module), name)
    return found


def main() -> None:
    """Print the JSON."""
    tcn, mlp = map(import_peer, sys.argv[1:])
    sys.stdout.write(json.dumps(measure_step(tcn, mlp, StepBenchSizes()), indent=1) + "\n")


if __name__ == "__main__":
    main()

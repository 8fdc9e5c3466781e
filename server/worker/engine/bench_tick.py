"""Measures what a tick costs the host, on a device that does nothing: one line of JSON for each line of the input.

`loadtest.benchmarks.tick` runs it as a script, once with the modules of its own checkout and once with those of another
one, whose rounds take turns. So it uses what both have: a checkout without `open_batch` stacks decoded arrays.

A round has three parts, each with milliseconds by the clock and of this process's CPU time, the medians of its
repetitions: `tick`, from the decoded rows of 1,000 requests to their answers; `bodies`, from 1,000 npy bodies to npy
answers, so that nothing is gained at the cost of decoder or encoder; `cpu`, the same for 64 bodies on the engine of the
CPU, which does compute.
"""

import io
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from handlers.base import Float32
from handlers.codecs.codec import NPY, FamilyCodec
from handlers.forecasters import build_family, random_tensors
from server.worker.engine.accelerator import DeviceEngine, DevicePool
from server.worker.engine.cpu import Engine
from server.worker.engine.memory_pool import Pool

SEED = 7
CONFIG = {"features": 8, "context_length": 168, "prediction_length": 24, "quantiles": 5}
TICK, CPU_ROWS = 1000, 64
MODELS = 64  #: resident ones; a device that does nothing reads no rows
WARM_UP = 6  #: ticks before the first round: a family's first ones bind staging
REPETITIONS = 15


class Done:
    """An event of a device that does nothing: it is over."""

    def query(self) -> bool:
        """Always."""
        return True

    def synchronize(self) -> None:
        """No wait."""


class IdleDevice:
    """See Device. It has the host's memory and, once it `is_idle`, does nothing with it."""

    where = torch.device("cpu")

    def __init__(self) -> None:
        self.is_idle = False

    def __repr__(self) -> str:
        """For example `<IdleDevice, idle>`."""
        return f"<IdleDevice, {'idle' if self.is_idle else 'at work'}>"

    def memory(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Zeros."""
        return torch.zeros(shape, dtype=dtype)

    host = memory

    def copy(self, target: torch.Tensor, source: torch.Tensor, after: object = None) -> Done:  # noqa: ARG002
        """At once."""
        target.copy_(source)
        return Done()

    def launch(self, work: Callable[[], object], after: object = None) -> Done:  # noqa: ARG002
        """At once, or never."""
        if not self.is_idle:
            with torch.inference_mode():
                work()
        return Done()

    def graph(self, work: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        """The work itself."""
        return work

    def drain(self) -> None:
        """No wait."""

    def trim(self) -> None:
        """It keeps nothing."""

    def free_and_total(self) -> tuple[int, int]:
        """More than enough."""
        return 1 << 40, 1 << 40


class TickBench:
    """One family's engines on the device that does nothing and on the CPU, and a tick's bodies."""

    def __init__(self, tick: int = TICK, cpu_rows: int = CPU_ROWS, repetitions: int = REPETITIONS) -> None:
        self.family = build_family("tcn", CONFIG)
        self.size, self.cpu_rows, self.repetitions = self.family.row_floats * 4, cpu_rows, repetitions
        self.codec = FamilyCodec(self.family)
        x = np.random.default_rng(SEED).standard_normal((tick, *self.family.input_shape), dtype=np.float32)
        self.bodies = [_write_npy(row) for row in x]
        self.offsets = [at % MODELS * self.size for at in range(tick)]
        self.device = IdleDevice()
        self.engine = DeviceEngine(DevicePool(MODELS * self.size, self.device), tick)
        self.on_cpu = Engine(Pool(MODELS * self.size, torch.device("cpu")), tick)
        for model in range(MODELS):
            row = self.family.row(random_tensors(self.family, SEED + model))
            for pool in (self.engine.pool, self.on_cpu.pool):
                pool.write(model * self.size, row)
        for _ in range(WARM_UP):
            self.answer(self.engine, self.bodies)
            self.answer(self.on_cpu, self.bodies[:cpu_rows])
        self.device.is_idle = True

    def __repr__(self) -> str:
        """For example `<TickBench of 1000 requests>`."""
        return f"<TickBench of {len(self.bodies)} requests>"

    def answer(self, engine: Any, bodies: Sequence[bytes]) -> list[bytes]:
        """Answer these bodies, as a step does."""
        inputs, encoders = self.decode(engine, bodies)
        answers = engine.run(self.family, self.offsets[: len(bodies)], inputs)
        return [encode(answer)[0] for encode, answer in zip(encoders, answers, strict=True)]

    def decode(self, engine: Any, bodies: Sequence[bytes]) -> tuple[Any, Sequence[Callable[[Float32], Any]]]:
        """The rows of the bodies where the engine takes them from, and the encoders of their answers."""
        open_batch = getattr(engine, "open_batch", None)
        if open_batch is None:
            calls = [self.codec.decode(body, NPY, NPY) for body in bodies]
            return [call.rows for call in calls], [call.encode for call in calls]
        inputs, encoders = open_batch(self.family), []
        for body in bodies:
            call = self.codec.decode(body, NPY, NPY, inputs.place)
            inputs.keep(call.rows)
            encoders.append(call.encode)
        return inputs, encoders

    def measure_round(self) -> dict[str, float]:
        """Milliseconds of each part, by the clock and of CPU time."""
        inputs, _ = self.decode(self.engine, self.bodies)
        parts: Mapping[str, Callable[[], object]] = {
            "tick": lambda: self.engine.run(self.family, self.offsets, inputs),
            "bodies": lambda: self.answer(self.engine, self.bodies),
            "cpu": lambda: self.answer(self.on_cpu, self.bodies[: self.cpu_rows]),
        }
        found = {}
        for name, work in parts.items():
            taken = [_time_both(work) for _ in range(self.repetitions)]
            found[f"{name}_ms"], found[f"{name}_cpu_ms"] = (
                statistics.median(each) for each in zip(*taken, strict=True)
            )
        return found


def _write_npy(row: Float32) -> bytes:
    file = io.BytesIO()
    np.save(file, row)
    return file.getvalue()


def _time_both(work: Callable[[], object]) -> tuple[float, float]:
    clock, cpu = time.perf_counter(), time.process_time()
    work()
    return (time.perf_counter() - clock) * 1e3, (time.process_time() - cpu) * 1e3


def main() -> None:
    """Measure until the input ends."""
    torch.set_num_threads(1)
    bench = TickBench()
    for _ in sys.stdin:
        sys.stdout.write(json.dumps(bench.measure_round()) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()

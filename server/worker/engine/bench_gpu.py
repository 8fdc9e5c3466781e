"""Benchmarks the accelerator in one process: `python -m server.worker.engine.bench_gpu` prints JSON for
`loadtest.benchmarks.gpu`.

Times are milliseconds, the medians of rounds in which the competitors alternate. A floor is the time of the bytes and
launches of the same work alone, on the same device in the same run.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from handlers.base import Family, Float32
from handlers.codecs.codec import FamilyCodec
from handlers.forecasters import build_family, random_tensors
from handlers.kinds import RowModel
from model_store.cache.slots import Slot, State
from model_store.names import ModelName
from server.worker.engine.accelerator import DeviceEngine, DevicePool
from server.worker.engine.device import CudaDevice, Device
from server.worker.engine.graph_choice import EAGER_RUNS
from server.worker.host_cache import HostCache

SEED = 7
CONFIG = {"features": 8, "context_length": 168, "prediction_length": 24, "quantiles": 5}
LAUNCHES = 5  #: launches of a forward: inputs, index, gather, graph, answers
COPY_FLOATS = 64 * 1024 * 1024  #: so large that a copy's start does not matter


@dataclass(frozen=True)
class GpuBenchSizes:
    """How much is measured."""

    tick: int = 1000
    resident: int = 10_000
    rounds: int = 15
    copy_floats: int = COPY_FLOATS


class GpuBench:
    """One family on one device: `resident` models in a pool; the first `tick` of them differ from each other."""

    def __init__(self, device: Device, sizes: GpuBenchSizes, family: Family) -> None:
        self.device, self.sizes, self.family = device, sizes, family
        self.row_bytes = family.row_floats * 4
        self.engine = DeviceEngine(DevicePool(sizes.resident * self.row_bytes, device), sizes.tick)
        distinct = [family.row(random_tensors(family, SEED + model)) for model in range(sizes.tick)]
        for model in range(sizes.resident):
            self.engine.pool.write(model * self.row_bytes, distinct[model % sizes.tick])
        rng = np.random.default_rng(SEED)
        self.x = rng.standard_normal((sizes.tick, 1, *family.input_shape), dtype=np.float32)
        self.everyone = rng.permutation(sizes.resident)[: sizes.tick].tolist()

    def __repr__(self) -> str:
        """For example `<GpuBench of tcn-4f1c2a9b, 10000 models>`."""
        return f"<GpuBench of {self.family.key}, {self.sizes.resident} models>"

    def run_step(self, models: Sequence[int]) -> Sequence[Float32]:
        """Run one step: from decoded rows to answers on the host."""
        return self.engine.run(self.family, [model * self.row_bytes for model in models], list(self.x[: len(models)]))

    def warm_up(self, models: Sequence[int]) -> Sequence[Float32]:
        """Run this step until it has its graph, and once more."""
        for _ in range(EAGER_RUNS):
            self.run_step(models)
        while self.engine.learn():
            pass
        return self.run_step(models)

    def measure_tick(self) -> dict[str, Any]:
        """Measure all models of a tick in one step, against their plain networks one by one on the same device."""
        networks = [self._network(model) for model in range(self.sizes.tick)]
        models = list(range(self.sizes.tick))

        def one_by_one() -> list[Float32]:
            with torch.inference_mode():
                asked = [torch.from_numpy(x).to(self.device.where) for x in self.x]
                return [net(x).cpu().numpy() for net, x in zip(networks, asked, strict=True)]

        found = self.warm_up(models)
        np.testing.assert_allclose(np.stack(found), np.stack(one_by_one()), rtol=1e-3, atol=1e-4)
        ours, eager = time_alternating([lambda: self.run_step(models), one_by_one], self.sizes.rounds)
        return {
            "models": len(models),
            "ms": ours,
            "one_by_one_eager_ms": eager,
            "ratio": eager["median"] / ours["median"],
            "floor_ms": self.measure_floor(len(models)),
        }

    def measure_scattered(self) -> dict[str, Any]:
        """Measure as many models as a tick, drawn from all residents, and single requests."""
        for models in (self.everyone, self.everyone[:1]):
            self.warm_up(models)
        many, one = time_alternating(
            [lambda: self.run_step(self.everyone), lambda: self.run_step(self.everyone[:1])], self.sizes.rounds
        )
        free, total = self.device.free_and_total()
        return {"resident": self.sizes.resident, "tick_ms": many, "single_ms": one, "device_bytes_used": total - free}

    def measure_return(self) -> dict[str, Any]:
        """Measure the return of an evicted model from host memory: its copy alone, and until the first answer."""
        shelf = HostCache(self.device.host(4 * self.family.row_floats), 3600)
        body = RowModel(self.family, FamilyCodec(self.family))
        slot = Slot(ModelName("m"), "v1", self.family.key, self.row_bytes, 0, State.RETIRING, 0.0)
        before = self.warm_up([0])[0]
        copies, answers = [], []
        for _ in range(self.sizes.rounds):
            numbers = shelf.keep(slot, body, time.time())
            assert numbers is not None, "the shelf is empty"
            self.engine.pool.keep(0, numbers)
            self.engine.pool.write(0, np.zeros(self.family.row_floats, np.float32))
            self.device.drain()
            started = time.perf_counter()
            back = shelf.take(ModelName("m"))
            assert back is not None, "it was kept just now"
            assert back.row is not None, "of a row model"
            self.engine.pool.write(0, back.row)
            self.device.drain()
            copied = time.perf_counter()
            answer = self.run_step([0])[0]
            answers.append((time.perf_counter() - started) * 1e3)
            copies.append((copied - started) * 1e3)
            np.testing.assert_allclose(answer, before, rtol=1e-4, atol=1e-5)  # a device adds in any order
        return {
            "row_bytes": self.row_bytes,
            "copy_ms": summarise_spread(copies),
            "first_answer_ms": summarise_spread(answers),
        }

    def measure_batches(self) -> dict[str, Any]:
        """Measure microseconds a request by batch size."""
        found = {}
        for rows in (1, 8, 64, 512):
            models = self.everyone[:rows]
            self.warm_up(models)
            (taken,) = time_alternating([lambda models=models: self.run_step(models)], self.sizes.rounds)  # type: ignore[misc]
            found[str(rows)] = {**taken, "us_a_request": taken["median"] * 1e3 / len(models)}
        return found

    def measure_floor(self, rows: int) -> dict[str, float]:
        """The ms of a step's bytes and launches alone: copies in and out, the gather, five launches."""
        rate, answer_bytes = self.measure_bandwidths(), int(np.prod(self.family.output_shape)) * 4
        floor = {
            "launches": LAUNCHES * rate["launch_ms"],
            "in": rows * self.x[0].nbytes / rate["in_bytes_per_ms"],
            "gather": rows * self.row_bytes / rate["copy_bytes_per_ms"],
            "out": rows * answer_bytes / rate["out_bytes_per_ms"],
        }
        return {**floor, "sum": sum(floor.values()), "gather_of_copy_bandwidth": floor["gather"] / self.gather_ms(rows)}

    def gather_ms(self, rows: int) -> float:
        """The ms of the gather alone, repeated so that its launch does not matter."""
        starts = torch.tensor(self.everyone[:rows]) * (self.row_bytes // 64)
        block, index = self.device.memory(rows, self.family.row_floats), self.device.memory(rows, dtype=torch.int64)
        self.device.launch(lambda: index.copy_(starts)).synchronize()
        return self._time_repeated(lambda: self.engine.pool.gather(index, block))

    def measure_bandwidths(self) -> dict[str, float]:
        """Bytes per ms of copies (into the device, within it, out of it), and the time of one empty launch."""
        size = self.sizes.copy_floats
        a, b, host = self.device.memory(size), self.device.memory(size), self.device.host(size)
        small = self.device.memory(1)
        return {
            "in_bytes_per_ms": size * 4 / self._time_repeated(lambda: a.copy_(host, non_blocking=True)),
            "copy_bytes_per_ms": size * 4 / self._time_repeated(lambda: b.copy_(a)),
            "out_bytes_per_ms": size * 4 / self._time_repeated(lambda: host.copy_(a, non_blocking=True)),
            "launch_ms": self._time_repeated(small.zero_, 1000),
        }

    def _time_repeated(self, work: Callable[[], object], times: int = 20) -> float:
        """Milliseconds of one run of `work`, of many that run back to back."""

        def many() -> None:
            for _ in range(times):
                work()

        self.device.launch(many).synchronize()
        started = time.perf_counter()
        self.device.launch(many).synchronize()
        return (time.perf_counter() - started) * 1e3 / times

    def _network(self, model: int) -> torch.nn.Module:
        network = self.family.reference()
        tensors = random_tensors(self.family, SEED + model)
        network.load_state_dict({name: torch.from_numpy(value) for name, value in tensors.items()})
        return network.to(self.device.where)


def measure_gpu(device: Device, sizes: GpuBenchSizes) -> dict[str, Any]:
    """Measure everything for the small convolution, and batches for the recurrence, which has the most launches."""
    tcn = GpuBench(device, sizes, build_family("tcn", CONFIG))
    found = {
        "tick": tcn.measure_tick(),
        "scattered": tcn.measure_scattered(),
        "returning": tcn.measure_return(),
        "tcn": tcn.measure_batches(),
    }
    gru = GpuBench(
        device, GpuBenchSizes(sizes.tick, sizes.tick, sizes.rounds, sizes.copy_floats), build_family("gru", CONFIG)
    )
    return {**found, "gru": gru.measure_batches()}


def time_alternating(works: Sequence[Callable[[], object]], rounds: int) -> list[dict[str, float]]:
    """Time each work once a round, in reverse order every other round; milliseconds, as `summarise_spread`."""
    taken: list[list[float]] = [[] for _ in works]
    for turn in range(rounds):
        for i in range(len(works))[:: 1 if turn % 2 else -1]:
            started = time.perf_counter()
            works[i]()
            taken[i].append((time.perf_counter() - started) * 1e3)
    return [summarise_spread(times) for times in taken]


def summarise_spread(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest value, and their number."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "runs": len(values)}


def main() -> None:
    """Print the JSON. Without a CUDA device: exit code 2 and a sentence."""
    if not torch.cuda.is_available():
        build_of = "is a build for the CPU" if torch.version.cuda is None else f"is built for CUDA {torch.version.cuda}"
        sys.stderr.write(f"no CUDA device here (torch {torch.__version__} {build_of}): this benchmark needs one\n")
        sys.exit(2)
    where = torch.device("cuda:0")
    found = measure_gpu(CudaDevice(where, "float32"), GpuBenchSizes())
    found["device"] = torch.cuda.get_device_name(where)
    sys.stdout.write(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

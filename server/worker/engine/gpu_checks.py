"""Checks for the first time on a GPU: `python -m server.worker.engine.gpu_checks NAME` prints facts about one thing.

`loadtest.benchmarks.first_gpu` runs each in a process of its own, since one that ruins CUDA's context would falsify the
next. The exit code is 1, with a line that begins with `WRONG`, where a check finds that something is not as it must be.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch

from handlers.base import Family, Float32
from handlers.forecasters import ARCHITECTURES, build_family, random_tensors
from handlers.kinds import run_row_on_cpu
from handlers.kinds.onnx import OnnxModel, Provider
from server.host import read_host
from server.worker.engine.accelerator import DeviceEngine, DevicePool
from server.worker.engine.cuda_start import shorten_error
from server.worker.engine.device import CudaDevice, Device, Precision
from server.worker.engine.device_budget import cache_share
from server.worker.engine.device_errors import is_lost
from server.worker.engine.graph_choice import EAGER_RUNS
from server.worker.engine.self_check import ONNX_MODEL, check_device, check_session

MIB = 1024 * 1024
RESERVE_BYTES = 2048 * MIB  #: as the setting gpu_reserve_bytes has it by default
FAMILIES = 24  #: in the check of memory: more than staging has room for
#: Allowed beside the CPU's answers, whose sums come in another order; samplers add up what each step is off.
ABSOLUTE, RELATIVE = 1e-4, 1e-3
FAR = 1 << 40  #: bytes: a row outside of every pool

Facts = Iterator[str]


class Wrong(Exception):
    """Something on this GPU is not as it must be."""


def check_names() -> Facts:
    """Each name that a worker would be shown is exactly one GPU to torch."""
    names = read_host().gpus
    yield f"planned: {', '.join(names) or 'none'}; torch sees {torch.cuda.device_count()}"
    code = "import sys, torch; sys.exit(torch.cuda.device_count() != 1)"
    for name in names:
        shown = {**os.environ, "CUDA_VISIBLE_DEVICES": name}
        if subprocess.run([sys.executable, "-P", "-c", code], env=shown, check=False).returncode:  # noqa: S603 -- ours
            raise Wrong(f"CUDA_VISIBLE_DEVICES={name} is not one GPU")
        yield f"CUDA_VISIBLE_DEVICES={name} is one GPU"


def check_start(device: Device) -> Facts:
    """What each worker checks at its start."""
    precision: Precision
    for precision in ("float32", "tf32", "bf16"):
        if not check_device(device, precision):
            raise Wrong("a forward cannot be captured")
        yield f"{precision}: steps and a captured graph are right"


def check_architectures(device: Device, names: tuple[str, ...] = tuple(ARCHITECTURES)) -> Facts:
    """Every architecture, alone and as an ensemble, one row and many: right, eager and replayed; and its times."""
    for name in names:
        for config in ({}, {"members": 2}):
            if config and ARCHITECTURES[name].samples:
                continue
            family = build_family(name, config)
            yield f"{family.key}: {_check_family(device, family, 64)}"
        device.trim()


def _check_family(device: Device, family: Family, most: int) -> str:
    row = family.row(random_tensors(family, 0))
    engine, said = DeviceEngine(DevicePool(row.nbytes, device), most), []
    engine.pool.write(0, row)
    for rows in (1, most):
        x = draw_inputs(family, rows)
        right, times, worst = run_row_on_cpu(family, row, x), list[float](), 0.0
        for turn in range(EAGER_RUNS + 3):
            while turn == EAGER_RUNS and engine.learn():
                pass
            started = time.perf_counter()
            (found,) = engine.run(family, [0], [x])
            times.append((time.perf_counter() - started) * 1e3)
            off = float((np.abs(found - right) / (ABSOLUTE + RELATIVE * np.abs(right))).max())
            worst = max(worst, off)
            if not off <= 1:
                raise Wrong(f"{family.key}, {rows} rows: {off:.2g} times the error that is allowed")
        taken = f"ms first {times[0]:.1f}, eager {times[1]:.2f}, last {times[-1]:.3f}"
        said.append(f"{rows} rows: error {worst:.2f} of what is allowed, {taken}")
    return "; ".join(said)


def check_failed_capture(device: Device) -> Facts:
    """A capture that fails leaves nothing behind: the next one succeeds, and memory can be freed."""
    one = device.memory(1)
    device.launch(one.zero_).synchronize()
    try:
        device.graph(lambda: one * float(one.item()))
    except RuntimeError as error:
        yield f"refused, as it should be: {shorten_error(error)}"
    else:
        raise Wrong("a host's read of a number was captured")
    if not check_device(device, "float32"):
        raise Wrong("after a failed capture a sound forward cannot be captured")
    yield "a sound forward is captured, and memory is freed"


def check_memory(device: Device, families: int = FAMILIES) -> Facts:
    """The whole pool's first and last row, and more families than have room for their staging."""
    budget = cache_share(device.free_and_total(), RESERVE_BYTES, 1)
    family = build_family("tcn", {})
    row = family.row(random_tensors(family, 1))
    engine, last = DeviceEngine(DevicePool(budget, device), 512), budget // 64 * 64 - -(-row.nbytes // 64) * 64
    for at in (0, last):
        engine.pool.write(at, row)
    x = draw_inputs(family, 1)
    first, second = engine.run(family, [0, last], [x, x])
    if not np.allclose(first, second, rtol=1e-4, atol=1e-5):
        raise Wrong(f"the rows at 0 and at {last} answer differently")
    yield f"first and last row of {engine.pool!r} answer alike"
    for number in range(families):
        other = build_family("mlp", {"hidden": 256 - number})
        engine.run(other, [0], [draw_inputs(other, 1)])
    free, _ = device.free_and_total()
    yield f"{families} families have run; {free // MIB} MiB are free"
    engine.trim()
    yield f"after a trim {device.free_and_total()[0] // MIB} MiB are free"


def check_onnx_session(provider: Provider = "cuda") -> Facts:
    """A session on the GPU, that it is there, its time at a new batch size, and its answers."""
    model = OnnxModel(ONNX_MODEL, provider=provider)
    found = model._session.get_providers()  # noqa: SLF001 -- where it runs is the question
    yield f"providers: {', '.join(found)}; charged {model.charge_bytes // 1024} KiB"
    if provider == "cuda" and found[0] != "CUDAExecutionProvider":
        raise Wrong("asked for CUDA, ONNX Runtime gave a session on the CPU")
    for rows in (1, 2, 64):
        started = time.perf_counter()
        model.run({"x": np.ones((rows, 3), np.float32)})
        yield f"{rows} rows: {(time.perf_counter() - started) * 1e3:.2f} ms"
    check_session(model)


def check_seeds(device: Device) -> Facts:
    """Two seeds are two draws, also at bf16."""
    family = build_family("deepar", {})
    row = family.row(random_tensors(family, 0))
    engine = DeviceEngine(DevicePool(row.nbytes, device), 8, bf16=True)
    x = np.zeros((2, *family.input_shape), np.float32)
    x[:, -1, 1] = 7
    x[0, -1, 0], x[1, -1, 0] = 1_000_001, 1_000_999
    found = engine.probe(family, row, x)
    if np.array_equal(found[0], found[1]):
        raise Wrong("at bf16 two seeds give the same paths")
    yield "two seeds, two draws"


def check_lost(device: Device) -> Facts:
    """A row outside of the pool ruins the context, and that is known as a reason to end the process. The last check."""
    family = build_family("tcn", {})
    engine = DeviceEngine(DevicePool(4 * family.row_floats * 4, device), 8)
    for at in (FAR, 0):
        try:
            engine.run(family, [at], [draw_inputs(family, 1)])
        except Exception as error:  # whatever the device raises is what is asked for
            yield f"{type(error).__name__}: {shorten_error(error)}"
            if not is_lost(error):
                raise Wrong("this error would leave the worker up") from error
        else:
            raise Wrong("it answered")


CHECKS: Mapping[str, Callable[[], Facts]] = {
    "names": check_names,
    "start": lambda: check_start(_open()),
    "architectures": lambda: check_architectures(_open()),
    "failed-capture": lambda: check_failed_capture(_open()),
    "memory": lambda: check_memory(_open()),
    "onnx": check_onnx_session,
    "seeds": lambda: check_seeds(_open("bf16")),
    "lost": lambda: check_lost(_open()),
}


def draw_inputs(family: Family, rows: int) -> Float32:
    """Inputs [rows, *input_shape]; whole numbers below 2**24 in the last channel, which is a sampler's seed."""
    rng = np.random.default_rng(rows)
    x = rng.standard_normal((rows, *family.input_shape), dtype=np.float32)
    if ARCHITECTURES[family.key.partition("-")[0]].samples:
        x[:, -1] = rng.integers(0, 1 << 24, x[:, -1].shape)
    return x


def _open(precision: Precision = "float32") -> CudaDevice:
    return CudaDevice(torch.device("cuda:0"), precision)


def main(name: str) -> int:
    """Run one check and print its facts. The exit code."""
    try:
        for fact in CHECKS[name]():
            sys.stdout.write(f"{fact}\n")
            sys.stdout.flush()
    except Wrong as wrong:
        sys.stdout.write(f"WRONG: {wrong}\n")
        return 1
    return 0


if __name__ == "__main__":
    code = main(sys.argv[1])
    sys.stdout.flush()
    os._exit(code)  # a lost device may hang whatever closes it

"""What a worker on a GPU proves before it is ready: its arithmetic, its graphs, and ONNX Runtime's session on it.

Runs once at the start, on the step thread, before the memory for models is taken: CUDA's context and the libraries'
workspaces then count as used.
"""

import base64
import time
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import structlog
import torch

from handlers.base import Family, Float32
from handlers.forecasters import build_family, random_tensors
from handlers.kinds import run_row_on_cpu
from handlers.kinds.onnx import OnnxModel, Provider
from handlers.work import SessionLimits
from model_store.errors import LoadError
from server.worker.engine.accelerator import DeviceEngine, DevicePool
from server.worker.engine.cuda_start import CannotStart, shorten_error
from server.worker.engine.device import Device, Precision

ROWS = 2
CONFIG = {"features": 2, "context_length": 16, "prediction_length": 4, "quantiles": 3}
#: How far an answer may be from the CPU's, as a share of the largest one.
TOLERANCE: Mapping[Precision, float] = {"float32": 1e-3, "tf32": 0.02, "bf16": 0.1}

#: An ONNX model, x [n, 3] -> y [n, 2]: ReLU of a product with ONNX_WEIGHTS. It was made with `onnx`.
ONNX_MODEL = base64.b64decode(
    "CAo6dQoRCgF4CgF3EgFhIgZNYXRNdWwKDAoBYRIBeSIEUmVsdRIBZyojCAMIAhABQgF3ShgAAIA/AAAAwAAAAD8AAEBAAAAAQAAAgD5aFAoBeBIPCg0I"
    "ARIJCgMSAW4KAggDYhQKAXkSDwoNCAESCQoDEgFuCgIIAkIECgAQEQ=="
)
ONNX_WEIGHTS = np.array([[1, -2], [0.5, 3], [2, 0.25]], np.float32)

log = structlog.get_logger()


class OnnxSession(Protocol):
    """What `check_onnx` wants of a model."""

    def run(self, feeds: Mapping[str, Float32]) -> Mapping[str, Float32]:
        """Arrays by input name -> arrays by output name."""


def check_device(device: Device, precision: Precision) -> bool:
    """Run a tiny family as requests do, and capture and replay its forward. Both must give the CPU's answers.

    False where the forward cannot be captured, which is also an error in the log: such a device is slow, but right.
    Raises CannotStart for wrong answers, and whatever the device raises.
    """
    started = time.perf_counter()
    family = build_family("tcn", CONFIG)
    row = family.row(random_tensors(family, 0))
    _check_steps(device, precision, family, row)
    captured = _check_graph(device, precision, family, row)
    device.trim()
    log.info("self_check", device=str(device.where), captured=captured, took_ms=_ms_since(started))
    return captured


def check_onnx(provider: Provider, limits: SessionLimits) -> bool:
    """Open and run one ONNX session. Raises CannotStart for wrong answers.

    It is the first of this process, whose limits hold for the memory of all.

    False where it cannot be opened or run, which is also an error in the log: a fleet may have no ONNX archives.
    """
    started = time.perf_counter()
    try:
        check_session(OnnxModel(ONNX_MODEL, provider=provider, limits=limits))
    except CannotStart:
        raise
    except LoadError as error:
        log.error("onnx_unusable", why=str(error), then="archives of kind onnx are refused")  # noqa: TRY400
    except Exception as error:  # whatever ONNX Runtime raises
        log.error("onnx_unusable", why=shorten_error(error), then="archives of kind onnx fail")  # noqa: TRY400
    else:
        log.info("onnx_self_check", provider=provider, took_ms=_ms_since(started))
        return True
    return False


def check_session(session: OnnxSession) -> None:
    """Raises CannotStart unless it computes what ONNX_MODEL says."""
    x = _draw((ROWS, len(ONNX_WEIGHTS)), 3)
    _compare("an ONNX session", session.run({"x": x})["y"], np.maximum(x @ ONNX_WEIGHTS, 0), TOLERANCE["tf32"])


def _check_steps(device: Device, precision: Precision, family: Family, row: Float32) -> None:
    """A step's whole way: copy of the row, inputs, gather, forward, answers. The first place holds no numbers."""
    engine = DeviceEngine(DevicePool(ROWS * row.nbytes, device), ROWS, bf16=precision == "bf16")
    engine.pool.write(row.nbytes, row)
    for seed in range(ROWS):
        x = _draw((ROWS, *family.input_shape), seed)
        (found,) = engine.run(family, [row.nbytes], [x])
        _compare("a step", found, run_row_on_cpu(family, row, x), TOLERANCE[precision])


def _check_graph(device: Device, precision: Precision, family: Family, row: Float32) -> bool:
    """Capture a forward, and replay it with other inputs. False if it cannot be captured."""
    rows, inputs = device.memory(ROWS, len(row)), device.memory(ROWS, *family.input_shape)
    found = device.host(ROWS, *family.output_shape)
    numbers = torch.from_numpy(np.repeat(row[None], ROWS, axis=0))
    weights: list[Sequence[torch.Tensor]] = []

    def warm_up() -> None:  # libraries initialise themselves, which a capture does not permit
        rows.copy_(numbers)
        inputs.zero_()
        weights.append(family.bind(rows))
        family.forward(weights[0], inputs)

    device.launch(warm_up).synchronize()
    try:
        replay = device.graph(lambda: family.forward(weights[0], inputs))
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        log.error("no_graphs", why=shorten_error(error), then="forwards run one kernel after the other")  # noqa: TRY400
        return False
    for seed in range(ROWS, 2 * ROWS):
        x = _draw((ROWS, *family.input_shape), seed)

        def work(x: Float32 = x) -> None:
            inputs.copy_(torch.from_numpy(x))
            found.copy_(replay())

        device.launch(work).synchronize()
        _compare("a captured graph", found.numpy(), run_row_on_cpu(family, row, x), TOLERANCE[precision])
    return True


def _draw(shape: tuple[int, ...], seed: int) -> Float32:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def _compare(what: str, found: Float32, right: Float32, tolerance: float) -> None:
    """Raises CannotStart unless the largest difference is within `tolerance` of the largest number."""
    off = float(np.abs(found - right).max() / np.abs(right).max())
    if not off <= tolerance:  # so also NaN
        raise CannotStart(
            f"the start-up self-check: {what} differs from the CPU's answer by {off:.2g} of its largest number "
            f"({tolerance:g} is allowed): do not use this GPU before its driver and memory are checked"
        )


def _ms_since(started: float) -> int:
    return round((time.perf_counter() - started) * 1e3)

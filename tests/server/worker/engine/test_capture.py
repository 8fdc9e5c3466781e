"""Captures that fail are over, whatever fails in them; what would fail is not captured."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch

from handlers.base import Family
from handlers.errors import DeviceFailed
from handlers.forecasters import build_family, random_tensors
from server.worker.engine.accelerator import DeviceEngine, DevicePool
from server.worker.engine.capture import NotCapturable
from server.worker.engine.device_errors import is_lost
from server.worker.engine.graph_choice import EAGER_RUNS
from tests.server.fake_device import FakeDevice
from tests.server.worker.engine.learning import learn_all
from tests.server.worker.engine.test_cpu import CONFIGS

MIB = 2**20


def fail_in_python(x: torch.Tensor) -> torch.Tensor:
    """An error that is no operator's."""
    raise ValueError(f"not with {x.shape}")


@pytest.mark.parametrize("work", [torch.nonzero, fail_in_python])
def test_a_failed_capture_is_over(work: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """The next capture is a graph, and memory can be freed. (As PyTorch leaves it, neither would ever be.)"""
    device = FakeDevice()
    x = device.memory(4)
    device.launch(x.zero_).synchronize()
    with pytest.raises(NotCapturable):
        device.graph(lambda: work(x))
    device.trim()
    replay, found = device.graph(lambda: x + 1), list[torch.Tensor]()
    device.launch(lambda: found.append(replay())).synchronize()
    assert found[0].tolist() == [1, 1, 1, 1]


def test_a_capture_out_of_memory_says_so_and_is_over() -> None:
    """The engine's caller frees memory and runs the step again."""
    device = FakeDevice(total_bytes=MIB)
    x = device.memory(MIB // 8)
    with pytest.raises(torch.OutOfMemoryError):
        device.graph(lambda: x + x + x)
    device.trim()
    assert device.ledger.used_bytes == MIB // 2


def test_a_capture_that_does_not_end_ends_the_worker() -> None:
    """No later capture or trim would work: the error is that of a context that is of no use any more."""
    device = FakeDevice(endless_captures=True)
    x = device.memory(4)
    with pytest.raises(DeviceFailed, match="does not end") as failed:
        device.graph(lambda: torch.nonzero(x))
    assert is_lost(failed.value)


class Reading:
    """A family that looks at a number."""

    def __init__(self, family: Family, read: Callable[[torch.Tensor], object]) -> None:
        self._family, self._read = family, read
        self.key = f"reading-{family.key}"

    def __getattr__(self, name: str) -> object:
        return getattr(self._family, name)

    def forward(self, weights: Sequence[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        """The family's."""
        self._read(x)
        return self._family.forward(weights, x)


@pytest.mark.parametrize(
    "read", [torch.Tensor.item, lambda x: x[x > 0], lambda x: torch.equal(x, x)], ids=["item", "mask", "equal"]
)
def test_a_family_that_reads_numbers_is_never_captured(read: Callable[[torch.Tensor], object]) -> None:
    """It is watched before a capture, so that none begins, after `trim` neither; other families are captured."""
    family = build_family("tcn", {**CONFIGS["tcn"], "features": 1, "context_length": 1})
    reading: Family = Reading(family, read)  # type: ignore[assignment]
    device, x = FakeDevice(), np.ones((1, *family.input_shape), np.float32)
    made = DeviceEngine(DevicePool(family.row_floats * 4, device), 16)
    made.pool.write(0, family.row(random_tensors(family, 0)))
    for _ in range(2):
        for _ in range(EAGER_RUNS + 2):
            made.run(reading, [0], [x])
        learn_all(made)
        assert device.captures == 0
        made.trim()
    for turn in range(EAGER_RUNS + 2):
        if turn == EAGER_RUNS:
            learn_all(made)
        made.run(family, [0], [x])
    assert (device.captures, device.replays) == (1, 2)


def test_a_family_that_fails_in_idle_time_is_not_captured_and_answers_on() -> None:
    """What a forward raises on zeros is no error of the worker's."""
    family, fails = build_family("tcn", {**CONFIGS["tcn"], "features": 1, "context_length": 1}), [False]

    def fail(_: torch.Tensor) -> None:
        if fails[0]:
            raise ValueError("not with zeros")

    failing: Family = Reading(family, fail)  # type: ignore[assignment]
    device, x = FakeDevice(), np.ones((1, *family.input_shape), np.float32)
    made = DeviceEngine(DevicePool(family.row_floats * 4, device), 16)
    made.pool.write(0, family.row(random_tensors(family, 0)))
    for _ in range(2):
        for _ in range(EAGER_RUNS):
            made.run(failing, [0], [x])
        fails[0] = True
        assert learn_all(made) <= 1
        fails[0] = False
    assert (device.captures, device.replays) == (0, 0)

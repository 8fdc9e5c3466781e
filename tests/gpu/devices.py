"""The devices of this folder's tests: a real GPU where there is one, and the simulated one, which proves the tests."""

import pytest
import torch

from server.worker.engine.device import CudaDevice, Device, Precision
from tests.server.fake_device import FakeDevice

NEEDS_CUDA = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device and a torch built for it"),
]
#: For `parametrize`: the same test on both.
DEVICES = [pytest.param("simulated", marks=pytest.mark.slow), pytest.param("cuda", marks=NEEDS_CUDA)]


def open_device(name: str, precision: Precision = "float32") -> Device:
    """One of `DEVICES`."""
    return CudaDevice(torch.device("cuda:0"), precision) if name == "cuda" else FakeDevice(0)

"""The device of a worker. Streams, events and graphs are tested in `test_accelerator` and `tests/gpu`."""

import pytest
import torch

from server.worker.engine.device import is_host_short


@pytest.mark.parametrize(
    ("said", "short"),
    [
        ("CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation'", True),
        (
            "CUDA error: OS call failed or operation not supported on this OS\nSearch for `cudaErrorOperatingSystem'",
            True,
        ),
        ("CUDA error: an illegal memory access was encountered", False),
        ("CUDA error: unspecified launch failure", False),
    ],
)
def test_a_host_without_memory_is_told_from_a_lost_device(said: str, short: bool) -> None:
    """The first costs a request, the second ends the worker; both come out of an allocation of page-locked memory."""
    assert is_host_short(torch.AcceleratorError(said)) is short

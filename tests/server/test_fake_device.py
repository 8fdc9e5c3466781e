"""The fake device is as strict as CUDA and PyTorch are: each test is a rule of theirs."""

import gc

import pytest
import torch

from tests.server.fake_device import FakeCapture, FakeDevice
from tests.server.fake_memory import GraphTouchesStranger
from tests.server.fake_operators import Recording

MIB = 2**20


def read_number(x: torch.Tensor) -> torch.Tensor:
    """What the host must wait for."""
    return x * float(x.sum())


@pytest.mark.parametrize(
    "work", [read_number, lambda x: x[x > 0], torch.nonzero, lambda x: torch.masked_select(x, x > 0), torch.unique]
)
def test_a_capture_that_fails_is_never_over(work: object) -> None:
    """Numbers and sizes that the host must wait for are refused; then no capture begins, and no cache is emptied."""
    device = FakeDevice()
    x = device.memory(4)
    device.launch(x.zero_).synchronize()
    capture = FakeCapture(device, Recording(device))
    capture.begin()
    with pytest.raises(torch.AcceleratorError, match="not permitted"), torch.inference_mode():
        work(x)  # type: ignore[operator]
    with pytest.raises(torch.AcceleratorError, match="previous error during capture"):
        capture.end()
    with pytest.raises(RuntimeError, match="captures_underway"):
        FakeCapture(device, Recording(device)).begin()
    with pytest.raises(RuntimeError, match="captures_underway"):
        device.trim()


@pytest.mark.slow
def test_memory_is_counted_and_ends_inside_of_work_too() -> None:
    """What `memory` gives and what operators make; it is back when nothing uses it any more, views included."""
    device = FakeDevice(total_bytes=10 * MIB)
    block = device.memory(MIB)
    assert device.free_and_total() == (6 * MIB, 10 * MIB)
    device.launch(block.zero_).synchronize()
    part = block[:10]
    del block
    gc.collect()
    assert device.ledger.used_bytes == 4 * MIB
    two_more = device.launch(lambda: (torch.empty(MIB), torch.empty(MIB)))
    with pytest.raises(torch.OutOfMemoryError, match="wanted"):
        two_more.synchronize()
    del part, two_more
    gc.collect()
    assert device.ledger.used_bytes == 0
    with pytest.raises(torch.OutOfMemoryError):
        device.memory(3 * MIB)


def test_page_locked_memory_is_a_property_and_ends() -> None:
    """It is counted in powers of two; other memory of the host's is not copied asynchronously in work."""
    device = FakeDevice(page_locked_bytes=10 * MIB)
    target, pinned = device.memory(MIB + 1), device.host(MIB + 1)
    assert device.page_locked.used_bytes == 8 * MIB
    with pytest.raises(torch.OutOfMemoryError):
        device.host(MIB + 1)
    device.launch(lambda: target.copy_(pinned, non_blocking=True)).synchronize()
    plain = torch.ones(MIB + 1)
    with pytest.raises(AssertionError, match="not page-locked"):
        device.launch(lambda: target.copy_(plain, non_blocking=True)).synchronize()


def test_an_error_of_the_context_stays() -> None:
    """Work that broke it fails, and so does every call after it."""
    device = FakeDevice()
    before = device.launch(lambda: None)
    with pytest.raises(torch.AcceleratorError, match="illegal memory access"):
        device.launch(device.break_context).synchronize()
    for call in (before.query, before.synchronize, device.drain, device.trim, device.free_and_total):
        with pytest.raises(torch.AcceleratorError):
            call()
    for make in (device.memory, device.host):
        with pytest.raises(torch.AcceleratorError):
            make(1)


@pytest.mark.slow
def test_a_graph_repeats_operators_and_not_python() -> None:
    """It sees the numbers of now at the addresses of its capture, branches as they were, and finds freed memory out."""
    device = FakeDevice()
    names = {"x": device.memory(3)}
    turn = [0]

    def do_work() -> torch.Tensor:
        turn[0] += 1
        kept = names["x"] + turn[0]
        return kept[1:].mul_(2)

    device.launch(names["x"].zero_).synchronize()
    replay = device.graph(do_work)
    found: list[list[float]] = []
    device.launch(lambda: found.append(replay().tolist())).synchronize()
    device.launch(lambda: names["x"].fill_(4)).synchronize()
    device.launch(lambda: found.append(replay().tolist())).synchronize()
    assert (found, turn) == ([[2, 2], [10, 10]], [1])
    names["x"] = device.memory(3)
    gc.collect()
    with pytest.raises(GraphTouchesStranger):
        device.launch(replay).synchronize()


def test_sums_differ_in_their_last_bit() -> None:
    """The order of a sum is the device's own, from one run to the next."""
    device = FakeDevice()
    x = torch.rand(8, 8)
    found: list[torch.Tensor] = []
    for _ in range(2):
        device.launch(lambda: found.append(x @ x)).synchronize()
    assert not torch.equal(*found)
    torch.testing.assert_close(*found, rtol=1e-6, atol=0)

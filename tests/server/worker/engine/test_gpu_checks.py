"""The checks for the first GPU, on the simulated one: the right device passes them, wrong ones are found."""

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from handlers.errors import DeviceFailed
from handlers.forecasters import build_family
from server.worker.engine import gpu_checks
from server.worker.engine.accelerator import DeviceEngine, DevicePool
from server.worker.engine.device import Event
from server.worker.engine.device_budget import CONTEXT_BYTES
from server.worker.engine.gpu_checks import RESERVE_BYTES, Wrong, draw_inputs
from tests.server.fake_device import FakeDevice, Work

MIB = 1024 * 1024


class Careless(FakeDevice):
    """Captures nothing: a graph is the work itself."""

    def graph(self, work: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        """See the class."""
        return work


class Lossy(FakeDevice):
    """A row outside of the memory ends it."""

    lost = False

    def _tell(self, stream: str, act: Callable[[], object], after: Event | None) -> Work:
        def note_check() -> None:
            try:
                act()
            except (IndexError, RuntimeError):
                self.lost = True
            if self.lost:
                raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

        if self.lost:
            note_check()
        return super()._tell(stream, note_check, after)


def test_a_right_device_passes_the_checks_of_a_start() -> None:
    """At each precision."""
    assert len(list(gpu_checks.check_start(FakeDevice()))) == 3


def test_architectures_are_compared_alone_and_as_ensembles() -> None:
    """The times are told for both."""
    said = list(gpu_checks.check_architectures(FakeDevice(), ("lear",)))
    assert [line.partition("-")[0] for line in said] == ["lear", "lear"]
    assert all("64 rows: error" in line for line in said)


def test_a_wrong_forward_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU's answer decides."""
    monkeypatch.setattr(gpu_checks, "run_row_on_cpu", lambda family, row, x: np.zeros((len(x), *family.output_shape)))
    with pytest.raises(Wrong, match="times the error that is allowed"):
        list(gpu_checks.check_architectures(FakeDevice(), ("lear",)))


def test_a_failed_capture_is_followed_by_a_sound_one() -> None:
    """A device that captures what it must not is found, and one on which a failed capture is never over."""
    said = list(gpu_checks.check_failed_capture(FakeDevice()))
    assert "as it should be" in said[0]
    assert len(said) == 2
    with pytest.raises(Wrong, match="was captured"):
        list(gpu_checks.check_failed_capture(Careless()))
    with pytest.raises(DeviceFailed):
        list(gpu_checks.check_failed_capture(FakeDevice(endless_captures=True)))


def test_seeds_are_kept_at_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """And a device that loses them is found."""
    assert len(list(gpu_checks.check_seeds(FakeDevice()))) == 1
    monkeypatch.setattr(DeviceEngine, "probe", lambda engine, family, row, x: np.zeros((2, 1)))
    with pytest.raises(Wrong, match="two seeds give the same paths"):
        list(gpu_checks.check_seeds(FakeDevice()))


def test_samplers_get_seeds_that_are_whole_numbers() -> None:
    """As requests have them; other families get numbers in every channel."""
    seeds = draw_inputs(build_family("deepar", {}), 3)[:, -1]
    assert np.array_equal(seeds, np.round(seeds))
    assert 0 <= seeds.min() < seeds.max() < 1 << 24
    others = draw_inputs(build_family("tcn", {}), 3)
    assert not np.array_equal(others[:, -1], np.round(others[:, -1]))


def test_the_pool_is_used_to_its_last_row() -> None:
    """And more families run than have room."""
    device = FakeDevice(total_bytes=CONTEXT_BYTES + RESERVE_BYTES + 8 * MIB)
    assert [line.partition(" ")[0] for line in gpu_checks.check_memory(device, families=2)] == ["first", "2", "after"]


def test_an_onnx_session_is_checked_where_it_is_asked_for() -> None:
    """On the CPU here."""
    assert len(list(gpu_checks.check_onnx_session("cpu"))) == 4


def test_a_lost_device_is_known_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that answers for a row that is not there is found, and so is an error that would leave a worker up."""
    said = list(gpu_checks.check_lost(Lossy()))
    assert said == ["AcceleratorError: CUDA error: an illegal memory access was encountered"] * 2
    with pytest.raises(Wrong, match="would leave the worker up"):
        list(gpu_checks.check_lost(FakeDevice()))
    monkeypatch.setattr(DevicePool, "gather", lambda pool, index, out: out.zero_())
    with pytest.raises(Wrong, match="it answered"):
        list(gpu_checks.check_lost(FakeDevice()))


def test_facts_and_verdict_are_printed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A line each, and the exit code."""

    def find() -> Iterator[str]:
        yield "a fact"
        raise Wrong("this and that")

    monkeypatch.setattr(gpu_checks, "CHECKS", {"good": lambda: iter(["fine"]), "bad": find})
    assert (gpu_checks.main("good"), gpu_checks.main("bad")) == (0, 1)
    assert capsys.readouterr().out == "fine\na fact\nWRONG: this and that\n"

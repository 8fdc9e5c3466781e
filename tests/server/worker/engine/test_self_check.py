"""The start-up self-check, on devices that are right, slow or wrong."""

from collections.abc import Callable, Mapping

import numpy as np
import onnx
import pytest
import torch
from structlog.testing import capture_logs

from handlers.base import Float32
from handlers.kinds.onnx import OnnxModel
from handlers.work import SessionLimits
from model_store.errors import UnsupportedKind
from server.worker.engine import self_check
from server.worker.engine.cuda_start import CannotStart
from server.worker.engine.device import Event, Precision
from server.worker.engine.self_check import ONNX_MODEL, ONNX_WEIGHTS, check_device, check_onnx, check_session
from tests.server.fake_device import FakeDevice, Work


class Stale(FakeDevice):
    """A replay gives what the first replay gave."""

    def graph(self, work: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        """See the class."""
        replay, first = super().graph(work), list[torch.Tensor]()

        def run_again() -> torch.Tensor:
            first.append(replay().clone())
            return first[0]

        return run_again


class Forgetful(FakeDevice):
    """One bit of each copied row is lost."""

    def copy(self, target: torch.Tensor, source: torch.Tensor, after: Event | None = None) -> Work:
        """See the class."""
        wrong = source.clone()
        wrong[len(wrong) // 2 :] += 1
        return super().copy(target, wrong, after)


class Broken(FakeDevice):
    """Every launch fails."""

    def launch(self, work: Callable[[], object], after: Event | None = None) -> Work:
        """See the class."""
        raise torch.AcceleratorError("CUDA error: no kernel image is available for execution on the device")


@pytest.mark.parametrize("precision", ["float32", "tf32", "bf16"])
@pytest.mark.parametrize("seed", range(3))
def test_a_right_device_passes_whatever_its_order(precision: Precision, seed: int) -> None:
    """It has run steps, captured a graph and replayed it, and holds no memory of the check."""
    device = FakeDevice(seed)
    assert check_device(device, precision)
    assert (device.captures, device.replays, device.trims) == (1, 2, 1)


@pytest.mark.parametrize(("device", "what"), [(Stale(), "a captured graph differs"), (Forgetful(), "a step differs")])
def test_a_wrong_device_is_refused(device: FakeDevice, what: str) -> None:
    """The message says which part of the check failed, by how much, and what to do."""
    with pytest.raises(CannotStart, match=rf"{what} from the CPU's answer by .* do not use this GPU"):
        check_device(device, "float32")


def test_a_device_without_graphs_is_slow_and_says_so() -> None:
    """It is ready: its answers are right."""
    with capture_logs() as logs:
        assert not check_device(FakeDevice(uncapturable=True), "float32")
    assert "no_graphs" in [each["event"] for each in logs]


def test_errors_of_the_device_are_raised_as_they_are() -> None:
    """The caller explains them."""
    with pytest.raises(torch.AcceleratorError, match="no kernel image"):
        check_device(Broken(), "float32")


def test_the_onnx_model_is_what_it_says() -> None:
    """The bytes in the source are a valid model, and compute the product and its ReLU."""
    onnx.checker.check_model(onnx.load_from_string(ONNX_MODEL))
    check_session(OnnxModel(ONNX_MODEL))
    assert check_onnx("cpu", SessionLimits())


def test_an_onnx_session_that_answers_wrong_is_refused() -> None:
    """A product without its ReLU is not what the model says."""

    class Wrong:
        """No ReLU."""

        def run(self, feeds: Mapping[str, Float32]) -> Mapping[str, Float32]:
            """See the class."""
            return {"y": np.asarray(feeds["x"] @ ONNX_WEIGHTS, np.float32)}

    with pytest.raises(CannotStart, match="an ONNX session differs"):
        check_session(Wrong())


@pytest.mark.parametrize(
    ("error", "then"),
    [
        (UnsupportedKind("this ONNX Runtime has no CUDAExecutionProvider: install fleetcast[cuda]"), "are refused"),
        (RuntimeError("[ONNXRuntimeError] : 1 : FAIL : libcudnn.so.9: cannot open shared object file"), "fail"),
    ],
)
def test_an_onnx_runtime_that_cannot_be_used_is_said_and_does_no_harm(
    monkeypatch: pytest.MonkeyPatch, error: Exception, then: str
) -> None:
    """Most fleets have no ONNX archives."""

    def refuse(model: bytes, *, provider: str, limits: SessionLimits) -> OnnxModel:
        raise error

    monkeypatch.setattr(self_check, "OnnxModel", refuse)
    with capture_logs() as logs:
        assert not check_onnx("cuda", SessionLimits())
    assert [(each["event"], each["log_level"]) for each in logs] == [("onnx_unusable", "error")]
    assert logs[0]["then"].endswith(then)
    assert str(error)[:50] in logs[0]["why"]

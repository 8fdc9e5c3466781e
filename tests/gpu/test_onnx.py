"""ONNX sessions on CUDA as a worker makes them; on the simulated runtime these tests are proved themselves."""

from collections.abc import Iterator
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from handlers.kinds import SingleModel, Target, build_model
from handlers.kinds.onnx import OnnxModel
from handlers.work import SessionLimits
from model_store.archives.archive import open_archive
from tests.e2e.models import Model, onnx_model
from tests.gpu.devices import DEVICES
from tests.handlers.kinds.fake_cuda_runtime import CUDA, FakeCuda, cuda_here

ON_DEVICE = Target("cuda", onnx_device="device")


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Which one."""
    with nullcontext() if request.param == "cuda" else cuda_here(FakeCuda()):
        yield request.param


def build(model: Model, target: Target = ON_DEVICE) -> OnnxModel:
    """The archive's session."""
    body = build_model(open_archive(model.data, model.name), target).body
    assert isinstance(body, SingleModel)
    assert isinstance(body.single, OnnxModel)
    return body.single


def ask(model: Model, session: OnnxModel, seed: int, rows: int = 1) -> None:
    """The network's own answers."""
    x = np.random.default_rng(seed).standard_normal((rows, *model.shape), np.float32)
    with torch.inference_mode():
        right = model.network(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(session.run({"x": x})["y"], right, rtol=1e-4, atol=1e-5)


def test_a_session_is_on_the_device_and_answers_as_the_network(device: str) -> None:
    """Float32 without TF32, alone and in batches of several sizes, and again in an order of sessions that change."""
    models = [onnx_model(f"onnx/{seed}.mar", seed) for seed in range(3)]
    sessions = [build(model) for model in models]
    for session in sessions:
        assert session._session.get_providers()[0] == CUDA
        assert session.charge_bytes > 0
    for turn, rows in enumerate((1, 2, 64, 1, 300)):
        for model, session in zip(models, sessions, strict=True):
            ask(model, session, turn, rows)


def test_requests_together_are_those_alone(device: str) -> None:
    """What is proved on the first requests holds for the next."""
    model = onnx_model("onnx/a.mar", 1)
    session = build(model)
    numbers = np.random.default_rng(0)
    for count in (2, 5, 40):
        asked = [{"x": numbers.standard_normal((1, *model.shape), np.float32)} for _ in range(count)]
        for feeds, answer in zip(asked, session.run_all(asked), strict=True):
            assert isinstance(answer, dict)
            np.testing.assert_allclose(answer["y"], session.run(feeds)["y"], rtol=1e-4, atol=1e-5)


def test_sessions_that_come_and_go_leak_nothing(device: str) -> None:
    """What the device has free does not shrink with their number."""
    model = onnx_model("onnx/a.mar", 1)
    limits = Target("cuda", onnx_device="device", sessions=SessionLimits(memory_bytes=64 * 2**20))
    free: list[int] = []
    for turn in range(12):
        ask(model, build(model, limits), turn)
        free.append(torch.cuda.mem_get_info()[0] if device == "cuda" else 0)
    assert free[3] - free[-1] < 64 * 2**20, f"free bytes after each session: {free}"


def test_a_small_model_stays_on_the_cpu_by_default(device: str) -> None:
    """The archive of these tests is one; it answers the same there."""
    model = onnx_model("onnx/a.mar", 1)
    session = build(model, Target("cuda"))
    assert "on the CPU" in repr(session)
    ask(model, session, 1, 3)

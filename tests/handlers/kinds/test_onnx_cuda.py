"""ONNX on CUDA: it is there or the load fails, its options, its memory and its errors. `tests/gpu` has the real one."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from handlers.errors import DeviceFailed, Overran, RunFailed
from handlers.kinds import Target, build_model
from handlers.kinds.models import SingleModel
from handlers.kinds.onnx import OnnxModel, place_session
from handlers.kinds.onnx.archive_kind import QUICK_S
from handlers.kinds.onnx.model import PROBE_S
from handlers.work import SessionLimits
from model_store.archives.archive import open_archive
from model_store.errors import ArchiveInvalid, LoadError, UnsupportedKind
from tests.e2e.models import onnx_model
from tests.handlers.kinds.fake_cuda_runtime import CUDA, HOSTNAME, FakeCuda, cuda_error, cuda_here
from tests.handlers.kinds.test_onnx import draw_requests, make_doubling, make_looping

X = {"x": np.ones((1, 2), np.float32)}
ILLEGAL = cuda_error("CUDA", 700, "an illegal memory access was encountered")


@pytest.fixture
def cuda() -> Iterator[FakeCuda]:
    """A device that works."""
    with cuda_here(FakeCuda()) as device:
        yield device


def on_cuda() -> OnnxModel:
    """A model of two numbers a row."""
    return OnnxModel(make_doubling("n", 2), provider="cuda")


def test_a_session_that_is_not_on_cuda_is_refused(cuda: FakeCuda) -> None:
    """The runtime answers with a session on the CPU where it cannot have CUDA: the load fails."""
    on_cuda()  # so that the arena is there
    cuda.works = False
    with pytest.raises(UnsupportedKind, match=r"gave a session on CPUEx.*fleetcast\[cuda\]"):
        on_cuda()


def test_missing_libraries_are_named(cuda: FakeCuda) -> None:
    """What the runtime did not find is in the message."""
    cuda.works = False
    with pytest.raises(
        UnsupportedKind, match=r"\(libcurand\.so\.10, libcublasLt\.so\.13 are missing here\): install fleetcast"
    ):
        on_cuda()


def test_wheels_for_different_cudas_are_refused(cuda: FakeCuda) -> None:
    """A process loads the libraries of one CUDA: the message has both versions. A minor one may differ."""
    cuda.cuda_version = "12.8"
    with pytest.raises(UnsupportedKind, match=r"torch is built for CUDA 13\.0, ONNX Runtime for CUDA 12\.8"):
        on_cuda()
    cuda.cuda_version = "13.2"
    assert np.array_equal(on_cuda().run(X)["y"], 2 * X["x"])


def test_a_torch_without_cuda_is_named(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the CPU's wheel of torch is installed beside onnxruntime-gpu."""
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(UnsupportedKind, match="torch is built without CUDA"):
        on_cuda()


@pytest.mark.parametrize("tf32", [False, True])
def test_what_a_session_asks_for(cuda: FakeCuda, *, tf32: bool) -> None:
    """Float32 unless the precision is tf32, a bounded arena that grows as asked, no benchmarks, our stream."""
    OnnxModel(make_doubling("n", 2), provider="cuda", limits=SessionLimits(memory_bytes=2**20), tf32=tf32)
    (first, options), rest = cuda.asked[0][0], cuda.asked[0][1:]
    assert first == CUDA
    assert rest == ["CPUExecutionProvider"]
    assert options == {
        "device_id": "0",
        "use_tf32": str(int(tf32)),
        "cudnn_conv_algo_search": "HEURISTIC",
        "arena_extend_strategy": "kSameAsRequested",
        "gpu_mem_limit": str(2**20),
        "do_copy_in_default_stream": "1",
        "user_compute_stream": str(cuda.cuda_stream),
    }
    assert cuda.preloads == 1


def test_no_session_falls_back(cuda: FakeCuda) -> None:
    """Neither at the load nor after an error of CUDA: the runtime's own fallback would be a session on the CPU, made
    without what we disable.
    """
    on_cuda()
    OnnxModel(make_doubling("n", 2))
    for options in cuda.options:
        assert options["enable_fallback"] == 0
        assert options["disabled_optimizers"] == ["ConstantFolding"]


def test_sessions_share_one_arena_of_the_device(cuda: FakeCuda) -> None:
    """A limit for all of them; without it each session would have one of its own, and as much."""
    for _ in range(3):
        OnnxModel(make_doubling("n", 2), provider="cuda", limits=SessionLimits(memory_bytes=2**20))
    assert [(name, arena.settings) for name, arena in cuda.arenas] == [
        (CUDA, {"max_mem": 2**20, "arena_extend_strategy": 1})
    ]
    assert cuda.preloads == 1


def test_the_charge_is_what_the_device_lost(cuda: FakeCuda) -> None:
    """Weights and handles at the load, workspaces at the first run, which the load makes; never less than the rule."""
    usual = on_cuda().charge_bytes
    cuda.takes_bytes, cuda.run_takes_bytes, cuda.runs = 50 * 2**20, 7 * 2**20, 0
    assert on_cuda().charge_bytes == 57 * 2**20
    assert cuda.runs == 1
    cuda.takes_bytes = cuda.run_takes_bytes = 0
    assert on_cuda().charge_bytes == usual > 0


@pytest.mark.parametrize(
    "said",
    [
        cuda_error("CUDA", 2, "out of memory"),
        cuda_error("CUBLAS", 3, "CUBLAS_STATUS_ALLOC_FAILED"),
        cuda_error("CUDNN", 4002, "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
        "while running Conv node. bfc_arena.cc Failed to allocate memory for requested buffer of size 2081488896",
    ],
)
def test_a_full_device_is_out_of_memory(cuda: FakeCuda, said: str) -> None:
    """So that idle models, staging and graphs are freed and the step runs once more, as for torch's own error."""
    loaded = on_cuda()
    cuda.run_errors = [said]
    with pytest.raises(torch.OutOfMemoryError):
        loaded.run_all([X])
    assert np.array_equal(loaded.run(X)["y"], 2 * X["x"])
    cuda.load_errors = [said]
    with pytest.raises(torch.OutOfMemoryError):
        on_cuda()


def test_an_archives_words_are_no_full_device(cuda: FakeCuda) -> None:
    """A node may have any name: it is in front of what the runtime says."""
    loaded = on_cuda()
    cuda.run_errors = ["running Add node. Name:'CUDA failure 2: out of memory' Status Message: shapes differ"]
    with pytest.raises(RunFailed, match="shapes differ"):
        loaded.run(X)


def test_a_model_that_needs_more_than_the_arena_is_at_fault(cuda: FakeCuda) -> None:
    """Nothing that could be freed would help: the limit is the setting's."""
    loaded = on_cuda()
    cuda.run_errors = ["bfc_arena.cc Available memory of 1024 is smaller than requested bytes of 4096"]
    with pytest.raises(RunFailed, match="smaller than requested"):
        loaded.run(X)


def test_requests_that_do_not_fit_together_run_alone(cuda: FakeCuda) -> None:
    """A batch takes more memory than its requests one by one, which then have their answers."""
    loaded = OnnxModel(make_doubling("n", 3), provider="cuda")
    cuda.run_errors = [cuda_error("CUDA", 2, "out of memory")]
    asked = draw_requests(1, 2)
    for feeds, answer in zip(asked, loaded.run_all(asked), strict=True):
        assert isinstance(answer, dict)
        np.testing.assert_array_equal(answer["y"], 2 * feeds["x"])


def test_a_lost_device_is_no_failure_of_the_model(cuda: FakeCuda) -> None:
    """After an illegal access every call fails, at a run and at a load: the worker is to end. The device is asked, so
    that an error which passes, such as of a launch with wrong sizes, stays the model's.
    """
    loaded = on_cuda()
    cuda.run_errors = [cuda_error("CUDA", 9, "invalid configuration argument")]
    with pytest.raises(RunFailed, match="failure 9") as failed:
        loaded.run(X)
    assert HOSTNAME not in str(failed.value), "clients are not told the host's name"
    cuda.run_errors, cuda.lost = [ILLEGAL], True
    with pytest.raises(DeviceFailed):
        loaded.run_all([X])
    cuda.load_errors = [ILLEGAL]
    with pytest.raises(DeviceFailed):
        on_cuda()


def test_a_broken_model_is_the_archives_fault_on_cuda_too(cuda: FakeCuda) -> None:
    """The runtime's words, without the name of the host."""
    cuda.load_errors = [cuda_error("CUDNN", 3000, "CUDNN_STATUS_NOT_SUPPORTED")]
    with pytest.raises(ArchiveInvalid, match=r"cannot be loaded.*NOT_SUPPORTED") as refused:
        on_cuda()
    assert HOSTNAME not in str(refused.value)


def test_small_models_stay_on_the_cpu(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """By default those that the CPU answers sooner than QUICK_S; `onnx_device` cpu and device decide for all."""
    target, raw = Target("cuda"), make_doubling("n", 2)
    took = QUICK_S / 2
    monkeypatch.setattr(OnnxModel, "time_row", lambda self: took)
    assert "on the CPU" in repr(place_session(raw, target))
    assert "on CUDA" in repr(place_session(raw, replace(target, onnx_device="device")))
    took = QUICK_S * 2
    assert "on CUDA" in repr(place_session(raw, target))
    assert "on the CPU" in repr(place_session(raw, replace(target, onnx_device="cpu")))
    assert "on the CPU" in repr(place_session(raw, Target("cpu", onnx_device="device")))


def test_a_row_is_timed() -> None:
    """A row of a known shape takes some time; one of open lengths, or one that fails or is slow, is not quick."""
    assert 0 < OnnxModel(make_doubling("n", 2)).time_row() < PROBE_S
    assert OnnxModel(make_doubling("n", "length")).time_row() == float("inf")
    endless = OnnxModel(make_looping(), limits=SessionLimits(forward_s=0.1, loops=True))
    assert endless.time_row() == float("inf")


def test_a_model_that_cannot_answer_ones_is_loaded(cuda: FakeCuda) -> None:
    """The run of a load proves nothing of a model: requests will show what is wrong with it."""
    cuda.run_errors = ["it does not like ones"]
    assert np.array_equal(on_cuda().run(X)["y"], 2 * X["x"])
    endless = OnnxModel(make_looping(), provider="cuda", limits=SessionLimits(forward_s=0.1, loops=True))
    with pytest.raises(Overran):
        endless.run(X)


def test_an_archive_on_a_host_whose_runtime_has_no_cuda(cuda: FakeCuda) -> None:
    """A small model is served by the CPU; one that belongs on the device fails, and the message says what to do."""
    cuda.works = False
    archive = open_archive(onnx_model("m.mar", 1).data, "m.mar")
    built = build_model(archive, Target("cuda", onnx_device="cpu"))
    assert isinstance(built.body, SingleModel)
    with pytest.raises(LoadError, match=r"m\.mar: .*onnx_device to cpu"):
        build_model(archive, Target("cuda", onnx_device="device"))

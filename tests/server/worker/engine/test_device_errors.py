"""Which errors end a worker, and that they do, with what it ran still noted."""

import subprocess
import sys

import pytest
import torch

from handlers.errors import DeviceFailed, RunFailed
from handlers.kinds.onnx.cuda import is_device_failure
from server.worker.engine.device_errors import EXIT_CODE, is_lost
from tests.patience import PATIENCE_S

ILLEGAL = "CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be asynchronously reported"
LOST = [
    torch.AcceleratorError(ILLEGAL),
    torch.AcceleratorError("CUDA error: device-side assert triggered"),
    torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered"),
    torch.AcceleratorError("CUDA error: unspecified launch failure"),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm( handle, opa)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR"),
    DeviceFailed("ONNX Runtime: CUDA failure 700"),
]
PASSES = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    torch.AcceleratorError("CUDA error: out of memory"),
    torch.AcceleratorError("CUDA error: operation not permitted when stream is capturing"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED"),
    RuntimeError("mat1 and mat2 shapes cannot be multiplied (1x2 and 3x4)"),
    RunFailed("the model said: CUDA error: an illegal memory access was encountered"),
    ValueError(ILLEGAL),
]


@pytest.mark.parametrize("error", LOST, ids=str)
def test_these_end_a_worker(error: Exception) -> None:
    """By themselves, and as the cause or the context of another error."""
    assert is_lost(error)
    caused = RunFailed("the model failed")
    caused.__cause__ = error
    assert is_lost(caused)
    meanwhile = torch.OutOfMemoryError("CUDA out of memory")
    meanwhile.__context__ = error
    assert is_lost(meanwhile)


@pytest.mark.parametrize("error", PASSES, ids=str)
def test_these_do_not(error: Exception) -> None:
    """What passes with the call, and what an archive or a client could have written into a message."""
    assert not is_lost(error)


def test_errors_in_a_circle_are_looked_at_once() -> None:
    """A chain of causes may be one's own."""
    first, second = RunFailed("a"), RunFailed("b")
    first.__cause__, second.__cause__ = second, first
    assert not is_lost(first)


@pytest.mark.parametrize(
    ("said", "fails"),
    [
        ("Non-zero status code returned while running MatMul. Name:'m' Status Message: CUDA failure 700: an x", True),
        ("[ONNXRuntimeError] : 1 : FAIL : CUDA failure 719: unspecified launch failure ; GPU=0", True),
        ("Status Message: CUBLAS failure 13: CUBLAS_STATUS_EXECUTION_FAILED ; GPU=0", True),
        ("Status Message: CUDNN failure 9: CUDNN_STATUS_NOT_SUPPORTED ; GPU=0", False),
        ("Status Message: CUDA failure 2: out of memory ; GPU=0 ; expr=cudaMalloc", False),
        ("Status Message: CUBLAS failure 3: CUBLAS_STATUS_ALLOC_FAILED ; GPU=0", False),
        ("Status Message: Failed to allocate memory for requested buffer of size 4096", False),
        ("Non-zero status code while running Add node. Name:'CUDA failure 700: x' Status Message: shapes", False),
    ],
)  # fmt: skip
def test_onnx_runtimes_messages_are_read_without_the_archives_words(said: str, fails: bool) -> None:
    """CUDA's own failures but those of memory; not the name of a node."""
    assert is_device_failure(said) is fails


@pytest.mark.slow
def test_the_process_ends_at_once_and_says_why() -> None:
    """No handler behind it runs, and the line is out."""
    script = (
        "import torch\n"
        "from server.logs import configure_logs\n"
        "from server.worker.engine.device_errors import ending_if_lost\n"
        "configure_logs('info', 'json')\n"
        "try:\n"
        "    with ending_if_lost():\n"
        f"        raise torch.AcceleratorError({ILLEGAL!r})\n"
        "finally:\n"
        "    print('still here')\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=PATIENCE_S
    )
    assert (ended.returncode, ended.stdout) == (EXIT_CODE, "")
    assert '"device_lost"' in ended.stderr
    assert "an illegal memory access was encountered" in ended.stderr
    assert "Traceback" not in ended.stderr

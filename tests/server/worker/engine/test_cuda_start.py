"""What an operator is told when a GPU cannot be used: by the messages of CUDA's runtime and of torch."""

import pytest
import torch

from server.worker.engine.cuda_start import CannotStart, check_build, explain_host_memory, explain_start

SAID = {
    "The NVIDIA driver on your system is too old (found version 12020). Please update your GPU driver by downloading "
    "and installing a new version from the URL: http://www.nvidia.com/Download/index.aspx": "driver 580 or newer",
    "CUDA driver version is insufficient for CUDA runtime version": "driver 580 or newer",
    "Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU": "start it with --gpus",
    "CUDA error: no kernel image is available for execution on the device\nCUDA kernel errors might be asynchronously "
    "reported at some other API call": "its compute capability",
    "No CUDA GPUs are available": "nvidia-smi -L",
    "CUDA error: invalid device ordinal": "CUDA_VISIBLE_DEVICES",
    "CUDA error: system not yet initialized": "nvidia-fabricmanager",
    "CUDA error: CUDA-capable device(s) is/are busy or unavailable": "--compute-mode=DEFAULT",
    "CUDA error: uncorrectable ECC error encountered": "Xid",
    "CUDA error: out of memory": "another process fills the GPU",
    "CUDA error: something that nobody has seen yet": "see nvidia-smi",
}


@pytest.mark.parametrize("said", SAID)
@pytest.mark.parametrize("kind", [RuntimeError, torch.AcceleratorError])
def test_each_of_cudas_errors_is_one_sentence_with_what_to_do(said: str, kind: type[Exception]) -> None:
    """One line that names the device, what CUDA says without its advice for programmers, and the remedy."""
    with pytest.raises(CannotStart) as found, explain_start("cuda:MIG-41b3"):
        raise kind(said)
    text = str(found.value)
    assert text.startswith("cuda:MIG-41b3 cannot be used: ")
    assert SAID[said] in text
    assert len(text.splitlines()) == 1
    assert "http" not in text
    assert "asynchronously" not in text


def test_a_torch_for_the_cpu_is_said_before_it_is_tried() -> None:
    """The sentence names the build, and both ways out."""
    with pytest.raises(CannotStart, match=r"2\.13\.0\+cpu.*install one for CUDA.*or serve with --device cpu"):
        check_build("cuda:0", "2.13.0+cpu", None)
    check_build("cuda:0", "2.13.0", "13.0")


def test_short_page_locked_memory_names_the_setting() -> None:
    """Torch raises its general error for it, not the one of a full device."""
    said = r"4294967296 bytes of page-locked .*out of memory\): lower --host-cache-bytes"
    with pytest.raises(CannotStart, match=said), explain_host_memory(4 << 30):
        raise torch.AcceleratorError("CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation'")


def test_errors_of_others_are_left_alone() -> None:
    """What is no error of the device keeps its type: a bug must not look like a broken GPU."""
    with pytest.raises(KeyError), explain_start("cuda:0"):
        raise KeyError("x")
    with pytest.raises(CannotStart, match=r"^the start-up self-check"), explain_start("cuda:0"):
        raise CannotStart("the start-up self-check found it")

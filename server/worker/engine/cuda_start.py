"""Why a worker cannot start on its GPU, as one sentence that says what to do. Runs while a worker starts."""

from collections.abc import Iterator
from contextlib import contextmanager

#: The oldest driver for CUDA 13: NVIDIA's table of minor version compatibility has ">= 580" for 13.x
#: (docs.nvidia.com/deploy/cuda-compatibility), and PyPI's torch 2.13 needs cuda-toolkit 13.0 (requirements-cuda.lock).
DRIVER = "580"
MOST_SAID = 300  #: characters of what CUDA says

#: What CUDA and torch say in lower case, and what an operator can do about it. The first that is found holds.
_ADVICE = (
    (
        ("driver on your system is too old", "driver version is insufficient", "forward compatibility was attempted"),
        f"install the NVIDIA driver {DRIVER} or newer on the host, or a torch for its CUDA (nvidia-smi names that)",
    ),
    (
        ("found no nvidia driver",),
        f"install the NVIDIA driver {DRIVER} or newer; in a container, start it with --gpus (NVIDIA container toolkit)",
    ),
    (
        ("unsupported display driver",),
        "the driver in the kernel and its libraries are of different versions: restart the host",
    ),
    (
        ("no kernel image",),
        "this torch has no code for a GPU of this age: install a torch that is built for its compute capability",
    ),
    (
        ("no cuda gpus are available", "no cuda-capable device", "invalid device ordinal"),
        "compare CUDA_VISIBLE_DEVICES with `nvidia-smi -L`, or leave it unset; in a container, start it with --gpus",
    ),
    (
        ("system not yet initialized",),
        "GPUs that are joined by NVSwitch need nvidia-fabricmanager, in the version of the driver, to run",
    ),
    (
        ("busy or unavailable", "exclusive"),
        "another process has the GPU for itself: end it, or nvidia-smi --compute-mode=DEFAULT, or start MPS",
    ),
    (("mps",), "see the logs of nvidia-cuda-mps-control, or stop it"),
    (
        ("ecc error", "uncorrectable", "unknown error", "fallen off the bus", "is lost", "system has unsupported"),
        "look for Xid in the kernel's log; the GPU may need a reset (nvidia-smi --gpu-reset) or replacement",
    ),
    (("out of memory",), "another process fills the GPU: see nvidia-smi; end it, or leave this GPU out"),
)
_OTHERWISE = f"see nvidia-smi; the driver has to be {DRIVER} or newer"


class CannotStart(ValueError):
    """The worker's GPU cannot be used. The message says why and what to do."""


def check_build(device: str, version: str, cuda: str | None) -> None:
    """Raises CannotStart for a torch without CUDA; `cuda` is what it was built for."""
    if cuda is None:
        raise CannotStart(
            f"{device} cannot be used: this torch ({version}) is a build for the CPU: install one for CUDA "
            "(pip install torch, or docker/cuda.Dockerfile), or serve with --device cpu"
        )


@contextmanager
def explain_start(device: str) -> Iterator[None]:
    """Raise CannotStart for what CUDA and torch raise while the device is opened and checked."""
    try:
        yield
    except (RuntimeError, AssertionError, OSError) as error:  # AssertionError: torch's own for a build without CUDA
        raise CannotStart(f"{device} cannot be used: {explain_error(error)}") from error


@contextmanager
def explain_host_memory(size: int) -> Iterator[None]:
    """The same for `size` bytes of page-locked host memory."""
    try:
        yield
    except RuntimeError as error:
        raise CannotStart(
            f"{size} bytes of page-locked host memory for evicted models cannot be had ({shorten_error(error)}): lower "
            "--host-cache-bytes (0: none), or raise the container's memory or the limit of locked memory (ulimit -l)"
        ) from error


def explain_error(error: BaseException) -> str:
    """What CUDA says, on one line, and what to do."""
    text = str(error).lower()
    advice = next((advice for said, advice in _ADVICE if any(each in text for each in said)), _OTHERWISE)
    return f"{shorten_error(error)}: {advice}"


def shorten_error(error: BaseException) -> str:
    """The first sentence of what CUDA or torch says: the others are advice for programmers."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].split(". ")[0].rstrip(" .")[:MOST_SAID]

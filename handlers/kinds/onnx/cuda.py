"""ONNX Runtime on CUDA: what a session asks for, whether it got it, and what its errors mean. Any thread may call it.

All sessions of a process work on one stream of ours and take intermediate results from one arena: what one run has
given back the next may use without waiting, and one limit holds for all of them. Nobody else works on that stream, so
a session can neither disturb a capture of the engine nor be captured.

INVARIANT: a session is on CUDA or there is none. ONNX Runtime itself goes on with the CPU where it cannot load CUDA's
libraries, and after an error of CUDA, and tells only its log.
"""

import contextlib
import io
import re
import threading
from types import ModuleType
from typing import Any

import torch

from handlers.errors import DeviceFailed, RunFailed
from model_store.errors import UnsupportedKind

PROVIDER = "CUDAExecutionProvider"
DEVICE = 0  #: the only GPU that a worker sees
OTHER_PLACE = "or set onnx_device to cpu"

#: What an error says when the device is full, and not the arena, whose limit is the model's affair.
FULL = re.compile(
    r"Failed to allocate memory for requested buffer|failure \d+: out of memory|_STATUS_ALLOC_FAILED"
    r"|DEVICE_ALLOCATION_FAILED"
)
#: As ONNX Runtime begins its messages of CUDA and its libraries: `CUDA failure 700: an illegal memory access ...`.
CUDA_FAILURE = re.compile(r"(CUDA|CUDNN|CUBLAS|CUFFT) (failure|error)\b", re.IGNORECASE)
FAILED_BEFORE = re.compile(r"EXECUTION_FAILED|INTERNAL_ERROR|MAPPING_ERROR", re.IGNORECASE)
PREFIX = re.compile(r"\[ONNXRuntimeError\] : \d+ : \w+ : ")
#: What follows in an error of CUDA, cuBLAS or cuDNN is for the people of this host: its name and files of the build.
OF_THIS_HOST = re.compile(r" ; GPU=.*", re.DOTALL)
LIBRARY = re.compile(r"lib[\w+-]+\.so[.\d]*\d")

_lock, _streams, _preloaded = threading.Lock(), list[torch.cuda.Stream](), list[str]()


def require_cuda(runtime: ModuleType) -> None:
    """Check that this ONNX Runtime and torch are built for one CUDA, and load its libraries.

    Raises UnsupportedKind that says what to install.
    """
    if PROVIDER not in runtime.get_available_providers():
        raise UnsupportedKind(f"this ONNX Runtime has no {PROVIDER}: install fleetcast[cuda], {OTHER_PLACE}")
    ours, theirs = torch.version.cuda, str(getattr(runtime, "cuda_version", "")) or None
    if ours is None:
        raise UnsupportedKind(f"this torch is built without CUDA: install fleetcast[cuda], {OTHER_PLACE}")
    if theirs is not None and ours.split(".")[0] != theirs.split(".")[0]:
        raise UnsupportedKind(
            f"torch is built for CUDA {ours}, ONNX Runtime for CUDA {theirs}; a process loads the libraries of one: "
            f"install fleetcast[cuda], which names versions that fit, {OTHER_PLACE}"
        )
    _preload_libraries(runtime)


def _preload_libraries(runtime: ModuleType) -> None:
    """Load CUDA's libraries from the wheels that torch came with: they lie where the linker does not look."""
    with _lock:
        preload = getattr(runtime, "preload_dlls", None)
        if _preloaded or preload is None:
            return
        said = io.StringIO()
        with contextlib.redirect_stdout(said):  # what it has to say it prints
            preload()
        names = dict.fromkeys(LIBRARY.findall(said.getvalue()))  # without paths, which are nobody's business
        _preloaded.append(", ".join(names))


def make_options(limit: int, *, tf32: bool) -> dict[str, str]:
    """The provider's options of a session whose intermediate results take at most `limit` bytes.

    Its defaults would round products of float32 to ten bits, try each algorithm of a convolution for seconds when a
    shape is first seen, and take twice the memory with each step that the arena grows.
    """
    return {
        "device_id": str(DEVICE),
        "use_tf32": str(int(tf32)),
        "cudnn_conv_algo_search": "HEURISTIC",
        "arena_extend_strategy": "kSameAsRequested",
        "gpu_mem_limit": str(limit),
        "do_copy_in_default_stream": "1",
        "user_compute_stream": str(_stream().cuda_stream),
    }


def share_device_arena(runtime: ModuleType, limit: int) -> None:
    """Make the arena of the device that all sessions share; to be called once in a process.

    It allocates nothing yet, but is the first to need CUDA's libraries. Raises UnsupportedKind that names what misses.
    """
    kinds = runtime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, DEVICE, runtime.OrtMemType.DEFAULT
    info = runtime.OrtMemoryInfo("Cuda", *kinds)
    as_asked = runtime.OrtArenaCfg({"max_mem": limit, "arena_extend_strategy": 1})
    try:
        runtime.create_and_register_allocator_v2(PROVIDER, info, {"device_id": str(DEVICE)}, as_asked)
    except Exception as error:
        raise UnsupportedKind(_say_missing("cannot use CUDA")) from error


def require_placed(session: Any) -> None:
    """Check that the session runs on CUDA. Raises UnsupportedKind that says what is missing."""
    found = list(session.get_providers())
    if found[:1] != [PROVIDER]:
        raise UnsupportedKind(_say_missing(f"was asked for {PROVIDER} and gave a session on {', '.join(found)}"))


def _say_missing(what: str) -> str:
    names = f" ({_preloaded[0]} are missing here)" if any(_preloaded) else ""
    return (
        f"ONNX Runtime {what}, as where libraries of CUDA or cuDNN cannot be loaded{names}: install fleetcast[cuda], "
        f"{OTHER_PLACE}"
    )


def read_failure(error: Exception) -> Exception:
    """What a failed run or load comes to: a device that is full, a device that is lost, or the model's own failure."""
    said = OF_THIS_HOST.sub("", str(error))
    if FULL.search(_without_names(said)):
        return torch.OutOfMemoryError(f"ONNX Runtime: {said}")
    if is_device_failure(said) and _is_lost():
        return DeviceFailed(f"ONNX Runtime: {said}")
    return RunFailed(f"ONNX Runtime: {said}")


def is_device_failure(message: str) -> bool:
    """Whether ONNX Runtime's message may be of a CUDA context that fails from now on, which being full is not."""
    said = _without_names(message)
    found = CUDA_FAILURE.match(said)
    if found is None or FULL.search(said):
        return False
    return found[1].upper() == "CUDA" or FAILED_BEFORE.search(said) is not None


def _without_names(message: str) -> str:
    """What follows the last `Status Message:`, since the names in front of it are the archive's."""
    return PREFIX.sub("", message.rpartition("Status Message:")[2].strip(), count=1)


def _is_lost() -> bool:
    """Whether the device says so itself when it is asked for the end of our work: some failures pass with their call,
    and an archive that asks for a launch of wrong sizes must not end a worker.
    """
    try:
        _stream().synchronize()
    except RuntimeError:
        return True
    return False


def read_free_bytes() -> int:
    """Memory of the device that nobody has."""
    free, _ = torch.cuda.mem_get_info(DEVICE)
    return free


def _stream() -> torch.cuda.Stream:
    """The stream of all sessions, made when it is first asked for, which is after those of the engine."""
    with _lock:
        if not _streams:
            _streams.append(torch.cuda.Stream(DEVICE))  # type: ignore[no-untyped-call]
        return _streams[0]

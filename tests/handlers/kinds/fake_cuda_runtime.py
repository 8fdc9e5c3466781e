"""ONNX Runtime as its CUDA build behaves, where there is no GPU: the real one on the CPU behind a rim that says CUDA.

What it imitates was seen with onnxruntime-gpu 1.31 on a host without CUDA's libraries (a session on the CPU and no
exception), or is in its Python sources (the fallbacks) and in the texts of its libraries (the errors).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import onnxruntime
import pytest
import torch

from handlers.kinds.onnx import cuda as onnx_cuda
from handlers.kinds.onnx import session

CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
HOSTNAME = "this-host"


def cuda_error(library: str, code: int, name: str) -> str:
    """An error as ONNX Runtime's CUDA provider words it."""
    return (
        f"[ONNXRuntimeError] : 1 : FAIL : {library} failure {code}: {name} ; GPU=0 ; hostname={HOSTNAME} ; "
        f"file=/onnxruntime_src/onnxruntime/core/providers/cuda/cuda_call.cc ; line=123 ; expr=cudaMalloc(&p, size); "
    )


class Session:
    """A session of the real runtime that says it is on CUDA, and fails as the device does."""

    def __init__(self, device: "FakeCuda", *given: Any, providers: list[Any], **options: Any) -> None:
        device.asked.append(providers)
        device.options.append(options)
        self._device, on_cuda = device, any(each != CPU for each in providers)
        if on_cuda:
            device.fail_if_due(device.load_errors)
            device.free_bytes -= device.takes_bytes
        self._session = onnxruntime.InferenceSession(*given, providers=[CPU], **options)
        self._found = [CUDA, CPU] if on_cuda and device.works else [CPU]

    def get_providers(self) -> list[str]:
        """Where it runs."""
        return self._found

    def run(self, *given: Any) -> Any:
        """On the CPU, or an error of the device."""
        if CUDA in self._found:
            self._device.runs += 1
            self._device.free_bytes -= self._device.run_takes_bytes if self._device.runs == 1 else 0
            self._device.fail_if_due(self._device.run_errors)
        return self._session.run(*given)

    def __getattr__(self, name: str) -> Any:
        """Inputs and outputs."""
        return getattr(self._session, name)


@dataclass
class FakeCuda:
    """The device and its runtime. `works`: whether CUDA's libraries can be loaded. Errors are raised once each."""

    works: bool = True
    cuda_version: str = "13.0"
    free_bytes: int = 2**33
    takes_bytes: int = 0
    run_takes_bytes: int = 0
    lost: bool = False
    load_errors: list[str] = field(default_factory=list)
    run_errors: list[str] = field(default_factory=list)
    asked: list[Any] = field(default_factory=list)
    options: list[dict[str, Any]] = field(default_factory=list)
    arenas: list[tuple[str, Any]] = field(default_factory=list)
    preloads: int = 0
    runs: int = 0

    def fail_if_due(self, errors: list[str]) -> None:
        """Raise the next error."""
        if errors:
            raise RuntimeError(errors.pop(0))

    # --- torch's rim ------------------------------------------------------------------------------------------------

    cuda_stream: int = 0x5EED

    def synchronize(self) -> None:
        """As a stream's: an error of the context comes back at every call."""
        if self.lost:
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    # --- onnxruntime's rim ------------------------------------------------------------------------------------------

    def get_available_providers(self) -> list[str]:
        """What it was built with, whether it works or not."""
        return [CUDA, CPU]

    def preload_dlls(self) -> None:
        """It prints what it does not find."""
        self.preloads += 1
        if not self.works:
            print("Failed to load libcurand.so.10: libcurand.so.10: cannot open shared object file")  # noqa: T201
            print("Failed to load /opt/wheels/nvidia/libcublasLt.so.13: file too short")  # noqa: T201 -- as it does

    def create_and_register_allocator_v2(self, provider: str, info: Any, options: dict[str, str], arena: Any) -> None:
        """Kept, where there is a device to have it."""
        del info, options
        if not self.works:
            raise RuntimeError("CUDA Provider not available, can't get interface for it")
        self.arenas.append((provider, arena))

    def make_arena(self, settings: dict[str, int]) -> Any:
        """The real configuration, and what it was made of."""
        return SimpleNamespace(settings=settings, real=onnxruntime.OrtArenaCfg(settings))

    def __getattr__(self, name: str) -> Any:
        """Everything else is the real runtime's."""
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(onnxruntime, name)


@contextmanager
def cuda_here(device: FakeCuda) -> Iterator[FakeCuda]:
    """This process sees the device and its runtime."""
    make: Callable[..., Session] = lambda *given, **named: Session(device, *given, **named)  # noqa: E731
    device.InferenceSession, device.OrtArenaCfg = make, device.make_arena  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "import_module", lambda name: device)
        patch.setattr(session, "_arenas", {"cpu"})
        patch.setattr(onnx_cuda, "_preloaded", [])
        patch.setattr(onnx_cuda, "_streams", [device])
        patch.setattr(onnx_cuda, "read_free_bytes", lambda: device.free_bytes)
        patch.setattr(torch.version, "cuda", "13.0")
        yield device

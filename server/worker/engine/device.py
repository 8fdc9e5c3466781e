"""A device with memory of its own: memory, streams, events and graphs behind one small protocol.

Work is launched on one of two concurrent streams: *loads* (copies of rows in and out) and *compute* (steps and moves).
A stream keeps the order of its work; `after` makes it wait for an event of the other stream. A launch does not block;
`Event.synchronize` does.

INVARIANT: until its event is done, no other code uses the memory that launched work reads or writes.
"""

from collections.abc import Callable
from math import prod
from typing import Literal, Protocol

import torch

from server.worker.engine.capture import CudaCapture, capture_graph

#: What CUDA says in lower case where the host has no memory to lock, or may not lock it.
HOST_SHORT = ("out of memory", "os call failed")

Precision = Literal["float32", "tf32", "bf16"]


class Event(Protocol):
    """A point in a stream's work, as `torch.cuda.Event` has it."""

    def query(self) -> bool:
        """Whether all work before it is done."""

    def synchronize(self) -> None:
        """Wait until all work before it is done. Raises the errors of that work."""


class Device(Protocol):
    """What a worker needs of a device. INVARIANT: one thread calls it."""

    where: torch.device

    def memory(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Device memory, uninitialised. Raises torch.OutOfMemoryError."""

    def host(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Page-locked host memory, which the device can copy asynchronously; uninitialised.

        Raises torch.OutOfMemoryError.
        """

    def copy(self, target: torch.Tensor, source: torch.Tensor, after: Event | None = None) -> Event:
        """Launch a copy between host and device on *loads*. Raises torch.OutOfMemoryError."""

    def launch(self, work: Callable[[], object], after: Event | None = None) -> Event:
        """Launch `work` on *compute*, in inference mode. Raises torch.OutOfMemoryError."""

    def graph(self, work: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        """Capture `work`. A call of the result, inside of launched work, repeats it on the memory of the capture.

        A call's result is overwritten by the next call. Raises as `capture.capture_graph` does.
        """

    def drain(self) -> None:
        """Wait until all launched work is done."""

    def trim(self) -> None:
        """Return unused memory to the device."""

    def free_and_total(self) -> tuple[int, int]:
        """Free bytes of the device, and all bytes."""


class CudaDevice:
    """One CUDA device through torch. Products of float32 are exact unless `precision` is tf32."""

    def __init__(self, where: torch.device, precision: Precision) -> None:
        torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
        torch.backends.cudnn.allow_tf32 = precision == "tf32"
        self.where = where
        self._compute = torch.cuda.Stream(where)  # type: ignore[no-untyped-call]
        self._loads = torch.cuda.Stream(where)  # type: ignore[no-untyped-call]
        self._graphs = torch.cuda.graph_pool_handle()  # shared: a graph's answer is read before the next replay

    def __repr__(self) -> str:
        """For example `<CudaDevice NVIDIA H200>`."""
        return f"<CudaDevice {torch.cuda.get_device_name(self.where)}>"

    def memory(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """See Device. Allocated on the compute stream: freed memory is reused only by later work of that stream."""
        with torch.cuda.stream(self._compute):
            return torch.empty(shape, dtype=dtype, device=self.where)

    def host(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """See Device."""
        try:
            return torch.empty(shape, dtype=dtype, pin_memory=True)
        except torch.AcceleratorError as error:
            if not is_host_short(error):
                raise
            raise torch.OutOfMemoryError(f"no {prod(shape) * dtype.itemsize} bytes of page-locked memory") from error

    def copy(self, target: torch.Tensor, source: torch.Tensor, after: Event | None = None) -> Event:
        """See Device. Memory that is not page-locked is copied before the call returns."""
        with torch.cuda.stream(self._loads):
            self._wait(self._loads, after)
            target.copy_(source, non_blocking=True)
            event: Event = self._loads.record_event()
        return event

    def launch(self, work: Callable[[], object], after: Event | None = None) -> Event:
        """See Device."""
        with torch.cuda.stream(self._compute), torch.inference_mode():
            self._wait(self._compute, after)
            work()
            event: Event = self._compute.record_event()
        return event

    def graph(self, work: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        """See Device. To be captured after an eager run, in which libraries initialise themselves."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._compute), torch.inference_mode():
            answer = capture_graph(CudaCapture(graph, self._graphs, self.where), work)

        def replay() -> torch.Tensor:
            graph.replay()
            return answer

        return replay

    def drain(self) -> None:
        """See Device."""
        self._loads.synchronize()
        self._compute.synchronize()

    def trim(self) -> None:
        """See Device."""
        torch.cuda.empty_cache()

    def free_and_total(self) -> tuple[int, int]:
        """See Device."""
        return torch.cuda.mem_get_info(self.where)

    @staticmethod
    def _wait(stream: torch.cuda.Stream, after: Event | None) -> None:
        if after is not None:
            assert isinstance(after, torch.cuda.Event), "an event of this device"
            stream.wait_event(after)


def is_host_short(error: torch.AcceleratorError) -> bool:
    """Whether an allocation of page-locked memory failed for want of it, and not because the device is lost. Pure.

    CUDA says that memory is out, or that the system refused to lock it (cudaErrorOperatingSystem).
    """
    said = str(error).lower()
    return any(each in said for each in HOST_SHORT)

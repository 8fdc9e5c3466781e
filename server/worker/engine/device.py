"""A device whose memory is not the host's: memory, streams, events and graphs behind one small protocol. Worker half.

Work is told to one of two streams that run beside each other: *loads* (rows in and out) and *compute* (steps, moves).
A stream keeps the order in which it was told; `after` makes it wait for an event of the other. Telling waits for
nothing: only `Event.synchronize` does, and until then whatever the work reads or writes belongs to it.
"""

from collections.abc import Callable
from typing import Literal, Protocol

import torch

Precision = Literal["float32", "tf32", "bf16"]


class Event(Protocol):
    """A point in a stream's work, as `torch.cuda.Event` has it."""

    def query(self) -> bool:
        """Whether all work before it is done."""

    def synchronize(self) -> None:
        """Wait until it is. Errors of that work surface here."""


class Device(Protocol):
    """What the worker wants of a device. One thread calls it."""

    where: torch.device

    def memory(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Device memory, uninitialised. Raises torch.OutOfMemoryError."""

    def host(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Host memory that the device copies from and to by itself (page-locked), uninitialised."""

    def copy(self, target: torch.Tensor, source: torch.Tensor, after: Event | None = None) -> Event:
        """Tell *loads* to copy between host and device. Raises torch.OutOfMemoryError."""

    def launch(self, work: Callable[[], object], after: Event | None = None) -> Event:
        """Tell *compute* what `work` does, in inference mode. Raises torch.OutOfMemoryError."""

    def graph(self, work: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        """`work` captured: a call inside of launched work repeats it on the very memory it was captured with.

        What a call returns is overwritten by the next. Raises RuntimeError for work that cannot be captured.
        """

    def drain(self) -> None:
        """Wait until the device has done all that it was told."""

    def trim(self) -> None:
        """Give memory that nothing uses back to the device."""

    def free_and_total(self) -> tuple[int, int]:
        """Bytes: free now for anybody, and there at all."""


class CudaDevice:
    """One CUDA device through torch. Float32 is exact unless `precision` allows tensor cores their tf32."""

    def __init__(self, where: torch.device, precision: Precision) -> None:
        torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
        torch.backends.cudnn.allow_tf32 = precision == "tf32"
        self.where = where
        self._compute = torch.cuda.Stream(where)  # type: ignore[no-untyped-call]
        self._loads = torch.cuda.Stream(where)  # type: ignore[no-untyped-call]
        self._graphs = torch.cuda.graph_pool_handle()  # one for all: a graph's answer is read before the next replays

    def __repr__(self) -> str:
        """For example `<CudaDevice NVIDIA H200>`."""
        return f"<CudaDevice {torch.cuda.get_device_name(self.where)}>"

    def memory(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """See Device. Of the compute stream: what is freed is given again only to work that comes later there."""
        with torch.cuda.stream(self._compute):
            return torch.empty(shape, dtype=dtype, device=self.where)

    def host(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """See Device."""
        return torch.empty(shape, dtype=dtype, pin_memory=True)

    def copy(self, target: torch.Tensor, source: torch.Tensor, after: Event | None = None) -> Event:
        """See Device. From memory that is not page-locked the driver copies before it returns."""
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
        """See Device. Captured after it has run eagerly: libraries set themselves up in the first run.

        `thread_local`: a loader thread that allocates meanwhile disturbs neither itself nor the capture.
        """
        graph = torch.cuda.CUDAGraph()
        capture = torch.cuda.graph(graph, self._graphs, self._compute, capture_error_mode="thread_local")
        with torch.inference_mode(), capture:
            answer = work()

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


def cache_share(free_and_total: tuple[int, int], reserve_bytes: int, sharers: int) -> int:
    """A worker's cache budget in bytes: an equal part of the device without the reserve, and no more than is free.

    Of the whole device and not of what is free, so that a restarted worker gets what its predecessor had.
    """
    free, total = free_and_total
    return max(0, min(free - reserve_bytes, (total - reserve_bytes) // sharers))

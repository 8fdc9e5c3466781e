"""The capture of work as a graph, on the step thread: a capture that fails is over when its error is raised.

PyTorch (2.9 to 2.13) leaves a failed capture half open: the stream stays current, and its allocator goes on as if a
capture were under way, so that no later capture begins and `empty_cache`, which out-of-memory recovery needs, asserts.
"""

from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from handlers.errors import DeviceFailed

_WAITING = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
_INDEXING = {"aten::index", "aten::index_put", "aten::index_put_"}  # of a shape that depends on numbers only by masks


class NotCapturable(RuntimeError):
    """The work cannot be captured; the device is as it was before."""


class Capture(Protocol):
    """One capture on a device, in parts as PyTorch has them."""

    def begin(self) -> None:
        """Begin to record what is launched."""

    def end(self) -> None:
        """End it. Raises RuntimeError for a capture that an illegal operation has ended before."""

    def abandon(self) -> None:
        """Tell the allocator that a capture is over whose `end` or `begin` raised. Raises RuntimeError if it is not."""


def capture_graph(capture: Capture, work: Callable[[], torch.Tensor]) -> torch.Tensor:
    """Capture `work`; returns its answer, whose memory a replay writes.

    Raises:
        NotCapturable: the capture failed, and is over.
        torch.OutOfMemoryError: the same, for want of memory.
        handlers.errors.DeviceFailed: the capture failed and will not end, so that the process is of no use any more.
    """
    try:
        capture.begin()
        answer = work()
        capture.end()
    except torch.OutOfMemoryError:
        _end_failed(capture)
        raise
    except Exception as error:
        _end_failed(capture)
        raise NotCapturable(str(error)) from error
    return answer


def _end_failed(capture: Capture) -> None:
    with suppress(RuntimeError):
        capture.end()  # succeeds after an error of Python's; its graph is dropped
    try:
        capture.abandon()
    except RuntimeError as error:
        raise DeviceFailed(f"a failed capture of a graph does not end: {error}") from error


class CudaCapture:
    """See Capture. To be used with the stream current that it captures."""

    def __init__(self, graph: torch.cuda.CUDAGraph, pool: Any, where: torch.device) -> None:
        self._graph, self._pool, self._where = graph, pool, where

    def __repr__(self) -> str:
        """For example `<CudaCapture on cuda:0>`."""
        return f"<CudaCapture on {self._where}>"

    def begin(self) -> None:
        """See Capture. `thread_local`: a loader thread may allocate memory during the capture."""
        torch.cuda.synchronize(self._where)
        torch.cuda.empty_cache()  # inside of a capture the allocator cannot free what it keeps
        self._graph.capture_begin(self._pool, capture_error_mode="thread_local")

    def end(self) -> None:
        """See Capture."""
        self._graph.capture_end()

    def abandon(self) -> None:
        """See Capture. The proof is that the cache can be emptied."""
        with suppress(RuntimeError):  # `end` may have come so far itself
            torch._C._cuda_endAllocateToPool(self._where.index, self._pool)  # noqa: SLF001 -- there is no public way
            torch._C._cuda_releasePool(self._where.index, self._pool)  # noqa: SLF001 -- as above
        torch.cuda.empty_cache()


class HostReads(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Watches an eager run for what a capture would fail of: operators for which the host waits, and host memory."""

    def __init__(self, where: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._where = where
        self.found = ""  #: the first such operator; empty: none

    def __repr__(self) -> str:
        """For example `<HostReads: aten::nonzero>`."""
        return f"<HostReads: {self.found or 'none'}>"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """One operator."""
        kwargs = kwargs or {}
        with self:  # an operator that is made of others is judged by these
            result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        result = func(*args, **kwargs)
        if not self.found and (waits_for_device(func, args) or self._leaves_device(args, kwargs, result)):
            self.found = func.name()
        return result

    def _leaves_device(self, *tree: object) -> bool:
        """Whether a tensor lies elsewhere; numbers of no dimension travel with a kernel's arguments."""
        return any(
            isinstance(leaf, torch.Tensor) and leaf.dim() and leaf.device.type != self._where.type
            for leaf in tree_leaves(tree)
        )


def waits_for_device(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether the host must wait for a number, or for the size of the result."""
    if func.name().partition(".")[0] in _INDEXING:
        return any(index is not None and index.dtype in {torch.bool, torch.uint8} for index in args[1])
    return not _WAITING.isdisjoint(func.tags)

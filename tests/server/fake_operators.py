"""The operators of work on the fake device: their memory is counted, and some may not be captured.

A graph repeats the operators that were recorded, on the memory of the capture: Python does not run again.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from server.worker.engine.capture import waits_for_device
from tests.server.fake_memory import Reference, get_address, list_new, list_tensors

if TYPE_CHECKING:
    from tests.server.fake_device import FakeDevice

NAN = float("nan")
NOT_CAPTURED = "CUDA error: operation not permitted when stream is capturing"
INVALIDATED = "CUDA error: operation failed due to a previous error during capture"
UNINITIALISED = {"aten::empty", "aten::new_empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty_strided"}
#: Operators that add many numbers, in an order that is the device's own.
SUMS = {f"aten::{name}" for name in ("bmm", "baddbmm", "baddbmm_", "mm", "addmm", "sum", "mean", "convolution")}


def poison(tensor: torch.Tensor) -> torch.Tensor:
    """Fill memory that nobody has written yet."""
    return tensor.fill_(NAN if tensor.is_floating_point() else -(10**15) if tensor.itemsize == 8 else 1)


class Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """See the module. With `capture`, the operators are recorded in it."""

    def __init__(self, device: "FakeDevice", capture: "Recording | None" = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._device, self._capture = device, capture

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """One operator."""
        kwargs = kwargs or {}
        with self:  # what is made of other operators is these operators
            result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        if self._capture is not None and waits_for_device(func, args):
            self._capture.invalid = True
            raise torch.AcceleratorError(f"{NOT_CAPTURED} ({func})")
        self._require_page_locked(func, args, kwargs)
        result = run_operator(self._device, func, args, kwargs)
        for tensor in list_new(result, args, kwargs):
            self._device.count(tensor)
        if self._capture is not None:
            self._capture.add(func, args, kwargs, result)
        return result

    def _require_page_locked(self, func: Any, args: Any, kwargs: Any) -> None:
        """A copy between host and device is asynchronous if the host's memory is page-locked, or else it blocks."""
        if func.name() != "aten::copy_" or not (kwargs.get("non_blocking") or args[2:] == (True,)):
            return
        device = self._device
        for tensor in args[:2]:
            known = device.ledger.get_serial(tensor) or device.page_locked.get_serial(tensor)
            assert known or not tensor.numel(), "an asynchronous copy of memory that is not page-locked"


def run_operator(device: "FakeDevice", func: Any, args: Any, kwargs: Any) -> Any:
    """The operator's result: poison where it writes nothing, and sums in another order."""
    result = func(*args, **kwargs)
    name = func.name().partition(".")[0]
    if name in UNINITIALISED:
        poison(result)
    if name in SUMS and result.is_floating_point():
        ulps = torch.randint(-1, 2, result.shape, generator=device.disorder)
        result.mul_(1 + ulps * torch.finfo(result.dtype).eps)
    return result


class Recording:
    """The operators of one capture. Its own memory is the graph's for as long as that lives."""

    def __init__(self, device: "FakeDevice") -> None:
        self.invalid = False
        self._device = device
        self._calls: list[tuple[Any, Any, Any, Any]] = []
        self._made: dict[int, torch.Tensor] = {}  # by address
        self._given: list[Reference] = []

    def __repr__(self) -> str:
        return f"<Recording of {len(self._calls)} operators>"

    def add(self, func: Callable[..., Any], args: Any, kwargs: Any, result: Any) -> None:
        """Record an operator with the addresses that it was given."""
        given = tree_map(self._refer, args), tree_map(self._refer, kwargs)
        self._made |= {get_address(tensor): tensor for tensor in list_new(result, args, kwargs)}
        self._calls.append((func, *given, result))

    def replay(self) -> None:
        """Do the operators again, into the memory where their results lay."""
        for reference in self._given:
            reference.check()
        for func, args, kwargs, result in self._calls:
            again = run_operator(self._device, func, args, kwargs)
            fresh = {id(tensor) for tensor in list_new(again, args, kwargs)}
            for before, now in zip(list_tensors(result), list_tensors(again), strict=True):
                if id(now) in fresh:
                    before.copy_(now)

    def _refer(self, leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or get_address(leaf) in self._made:
            return leaf
        self._given.append(Reference(leaf, self._device.ledger))
        return self._given[-1].tensor

"""The work of one row of a family, found from its shapes before a request runs: see `handlers.work`.

One forward of zeros is run operator by operator and ended before the operator that would go beyond a limit, so a
hostile configuration costs at most what one row may cost. Tensors without numbers (`meta`) would cost nothing even
then, but torch's rules of shapes take 0.7 s and 80 MB to import and some 0.4 ms a call: half a second for a recurrence
of 168 steps, against 20 ms here.
"""

from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from handlers.base import Family
from handlers.work import ROW_CALLS, ROW_FLOPS, ROW_NUMBERS, Work, require_sides
from model_store.errors import ArchiveInvalid

_aten = torch.ops.aten
_PRODUCTS: Mapping[Any, Callable[..., int]] = {
    **flop_registry,
    _aten.baddbmm_: flop_registry[_aten.baddbmm],
    _aten.addmm_: flop_registry[_aten.addmm],
}
#: Operators that make a tensor of a size they are told -> the place of that size among their arguments.
_FACTORIES = {
    _aten.empty: 0, _aten.zeros: 0, _aten.ones: 0, _aten.full: 0, _aten.rand: 0, _aten.randn: 0,
    _aten.new_empty: 1, _aten.new_zeros: 1, _aten.new_ones: 1, _aten.new_full: 1, _aten.empty_strided: 0,
}  # fmt: skip


MOST_FAMILIES = 4096  #: whose work is remembered
_found: dict[str, Work] = {}


class _RowMeter(TorchDispatchMode):
    """Counts what runs inside it. Raises ArchiveInvalid before an operator that goes beyond what a row may cost."""

    def __init__(self, what: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._what = what
        self.calls = self.numbers = self.flops = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled here: otherwise torch imports its compiler at the first call, 1.6 s and 80 MB."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = func.overloadpacket
        self.calls += 1
        if packet in _FACTORIES:
            self._require(numbers=prod(args[_FACTORIES[packet]]))
        product = _PRODUCTS.get(packet)
        if product is not None and packet not in (_aten.convolution, _aten._convolution):  # noqa: SLF001
            self._require(flops=product(*args, **{**kwargs, "out_val": None}))
        found = func(*args, **kwargs)
        if isinstance(found, torch.Tensor) and not func.is_view:
            self.numbers += 0 if func._schema.is_mutable else found.numel()  # noqa: SLF001
            self.flops += found.numel()
        if product is not None:
            self.flops += product(*args, **{**kwargs, "out_val": found})
        self._require()
        return found

    def _require(self, numbers: int = 0, flops: int = 0) -> None:
        for what, count, limit in (
            ("numbers in its results", self.numbers + numbers, ROW_NUMBERS),
            ("floating-point operations", self.flops + flops, ROW_FLOPS),
            ("calls of torch", self.calls, ROW_CALLS),
        ):
            if count > limit:
                raise ArchiveInvalid(f"{self._what}: one row takes {count} {what} or more, {limit} are allowed")


def row_work(family: Family) -> Work:
    """What one row costs, found once for a family. Raises ArchiveInvalid with the numbers beyond a limit of one row."""
    work = _found.get(family.key)
    if work is None:
        while len(_found) >= MOST_FAMILIES:
            _found.pop(next(iter(_found)), None)
        work = _found[family.key] = _measured(family)
    return work


def _measured(family: Family) -> Work:
    require_sides(family.key, family.input_shape, family.output_shape)
    row, x = torch.zeros(1, family.row_floats), torch.zeros(1, *family.input_shape)
    with torch.inference_mode(), _RowMeter(family.key) as meter:
        weights = family.bind(row)
        scratch = meter.numbers
        family.forward(weights, x)
    return Work(
        given=prod(family.input_shape),
        answered=prod(family.output_shape),
        flops=meter.flops,
        numbers=meter.numbers,
        calls=meter.calls,
        scratch=scratch,
    )

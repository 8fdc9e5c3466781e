"""How much memory a family's forward takes beside its rows and inputs: measured once, for one row, on the CPU.

On the thread that loads the family's first model, because it takes some tenths of a second. Tensors without numbers
("meta") would compute nothing, but take seconds for a recurrence: their operators are Python.
"""

import weakref
from math import prod
from typing import Any, NamedTuple

import structlog
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from handlers.base import Family

MOST_FAMILIES = 4096  #: whose measures are remembered: an archive's author chooses its family
UNKNOWN_FACTOR = 8  #: of inputs, answers and row, where a forward cannot be run on zeros

log = structlog.get_logger()


class WorkBytes(NamedTuple):
    """Bytes for each row of a forward, beside rows, inputs and answers in staging."""

    bound: int  #: scratch that a binding keeps
    peak: int  #: the most that lives at one moment of a forward, answer included


_found: dict[tuple[str, bool], WorkBytes] = {}  # threads may measure the same family at the same time


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes that operators make and that are still used."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._known = weakref.WeakSet[Any]()

    def __repr__(self) -> str:
        """For example `<LiveBytes 4096, at most 8192>`."""
        return f"<LiveBytes {self.live}, at most {self.peak}>"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """One operator."""
        kwargs = kwargs or {}
        with self:  # an operator that is made of others needs their memory
            result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, torch.Tensor):
                self._known.add(leaf.untyped_storage())
        result = func(*args, **kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage() not in self._known:
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        self._known.add(storage)
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, storage.nbytes()).atexit = False

    def _free(self, size: int) -> None:
        self.live -= size


def measure_work(family: Family, *, bf16: bool) -> WorkBytes:
    """Measure the scratch of a binding and the temporaries of a forward, for each row; once for a family."""
    work = _found.get((family.key, bf16))
    if work is None:
        while len(_found) >= MOST_FAMILIES:
            _found.pop(next(iter(_found)), None)
        work = _found[family.key, bf16] = _measure_or_guess(family, bf16=bf16)
    return work


def _measure_or_guess(family: Family, *, bf16: bool) -> WorkBytes:
    try:
        return _measure(family, torch.bfloat16 if bf16 else torch.float32)
    except Exception as error:  # the run itself will say what is wrong
        log.warning("work_not_measured", family=family.key, error=str(error))
        numbers = family.row_floats + prod(family.input_shape) + prod(family.output_shape)
        return WorkBytes(4 * numbers, UNKNOWN_FACTOR * 4 * numbers)


def _measure(family: Family, kind: torch.dtype) -> WorkBytes:
    block, x = torch.zeros(1, family.row_floats, dtype=kind), torch.zeros(1, *family.read_shape)
    with torch.inference_mode(), LiveBytes() as counted:
        weights = family.bind(block)
        bound = counted.peak = counted.live
        family.forward(weights, x).float()
    copy = block.nbytes if kind != torch.float32 else 0  # of the rows in a short precision
    return WorkBytes(bound + copy, counted.peak - bound)

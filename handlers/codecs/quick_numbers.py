"""The compiled reader of numbers, `_quick_numbers.c`, or what stands in for it where no compiler made it.

An installation from source without a C compiler has no compiled part. Then `read_tensors` gives every body back, which
`handlers.codecs.tensors` reads by simdjson, in about twice the time; nothing else changes. `fleetcast doctor` says
which one runs.
"""

from collections.abc import Mapping
from functools import lru_cache

import numpy as np

from handlers.base import Float32, Shape

try:
    from handlers.codecs import _quick_numbers as compiled
except ImportError:  # nothing compiled it, or for another machine
    IS_COMPILED = False
else:
    IS_COMPILED = True


def read_tensors(body: bytes, shapes: Mapping[str, Shape]) -> dict[str, Float32] | None:
    """Read `{"x": [8][168]}` as {"x": array [8, 168]}, if it has exactly these names and plain numbers.

    Returns None for every other body, right or wrong, which has to be read by other means.
    """
    names, lengths = _list_wanted(tuple(shapes.items()))
    found = compiled.read_tensors(body, names, lengths) if names else None
    if found is None:
        return None
    return {
        name: np.frombuffer(numbers, np.float32).reshape(dims)
        for name, (numbers, dims) in zip(shapes, found, strict=True)
    }


def are_finite(numbers: Float32) -> bool:
    """Whether all numbers of a C-contiguous array are finite."""
    return compiled.are_finite(numbers) if IS_COMPILED else bool(np.isfinite(numbers).all())


@lru_cache(maxsize=256)
def _list_wanted(shapes: tuple[tuple[str, Shape], ...]) -> tuple[tuple[bytes, ...], tuple[Shape, ...]]:
    """Return names and shapes as the compiled reader takes them; no names where it cannot read these.

    It compares the bytes of a name with those of the body, where JSON writes some characters in several ways.
    """
    if not IS_COMPILED or any(ord(char) < ord(" ") or char in '"\\' for name, _ in shapes for char in name):
        return (), ()
    return tuple(name.encode() for name, _ in shapes), tuple(shape for _, shape in shapes)

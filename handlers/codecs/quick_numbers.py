"""The compiled reader of numbers, `_quick_numbers.c`, or what stands in for it where no compiler made it.

An installation from source without a C compiler has no compiled part. Then `read_tensors` gives every body back, which
`handlers.codecs.tensors` reads by simdjson, in about twice the time; nothing else changes. `fleetcast doctor` says
which one runs.
"""

import numpy as np

from handlers.base import Float32, Shape

try:
    from handlers.codecs._quick_numbers import are_finite, read_tensors
except ImportError:  # nothing compiled it, or for another machine
    IS_COMPILED = False

    def read_tensors(
        body: bytes, names: tuple[bytes, ...], shapes: tuple[Shape, ...], /
    ) -> tuple[tuple[bytearray, Shape], ...] | None:
        """Give the body back: None."""
        del body, names, shapes
        return None

    def are_finite(numbers: Float32, /) -> bool:
        """Whether all numbers of a C-contiguous array are finite."""
        return bool(np.isfinite(numbers).all())

else:
    IS_COMPILED = True

__all__ = ["IS_COMPILED", "are_finite", "read_tensors"]

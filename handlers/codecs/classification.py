"""The classification extension of the Open Inference Protocol: an output's largest values with their places. No torch.

An element of the answer is `VALUE:PLACE`, largest first, as Triton writes it: whole numbers as they are, others with
six decimals. Models here have no labels. Source: Triton 2.51's classification extension.
"""

import numpy as np

from handlers.codecs.datatypes import BF16, Array, Datatype, widen_bf16

MOST_CLASSES = 1000  #: of one row


def classify_rows(array: Array, datatype: Datatype, count: int, *, has_rows: bool) -> Array:
    """Of an array [rows, ...] or, without the axis of rows, [...]: strings [rows, count] or [count], or fewer."""
    rows = array.reshape(len(array), -1) if has_rows else array.reshape(1, -1)
    if datatype.name == BF16:
        rows = widen_bf16(rows)
    numbers = rows.astype(np.int64 if datatype.kind == "boolean" else rows.dtype)
    shown = min(count, rows.shape[1])
    found = np.empty((len(rows), shown), object)
    for i, row in enumerate(numbers):
        # INVARIANT: of equal values the first comes first; numbers are not negated, which would wrap unsigned ones.
        best = (len(row) - 1 - np.argsort(row[::-1], kind="stable"))[::-1][:shown]
        for j, place in enumerate(best):
            value = f"{row[place]:.6f}" if datatype.kind == "float" else str(row[place])
            found[i, j] = f"{value}:{place}"
    return found if has_rows else found[0]

"""Where the parts of a model lie in its flat row, and what its tensors must look like before they go there."""

from collections.abc import Mapping
from math import prod

import numpy as np
import torch

from handlers.base import Float32, Shape
from model_store.errors import ArchiveInvalid

ALIGN = 16  #: floats: every part starts on a 64-byte cache line


class Layout:
    """Named parts of a flat float32 row, each aligned to 16 floats; what lies between them is zero."""

    def __init__(self, parts: Mapping[str, Shape]) -> None:
        self._places: dict[str, tuple[int, int, Shape]] = {}
        at = 0
        for name, shape in parts.items():
            self._places[name] = (at, at + prod(shape), shape)
            at += -(-prod(shape) // ALIGN) * ALIGN
        self.row_floats = at

    def __repr__(self) -> str:
        return f"<Layout {len(self._places)} parts, {self.row_floats} floats>"

    def arrays(self, row: Float32) -> dict[str, Float32]:
        """One row [row_floats] -> writable views of its parts."""
        return {name: row[start:end].reshape(shape) for name, (start, end, shape) in self._places.items()}

    def views(self, block: torch.Tensor) -> dict[str, torch.Tensor]:
        """Rows [B, row_floats] -> views [B, *shape] of their parts."""
        rows = block.shape[0]
        return {name: block[:, start:end].view(rows, *shape) for name, (start, end, shape) in self._places.items()}


def check_tensors(parameters: Mapping[str, Shape], tensors: Mapping[str, Float32]) -> None:
    """Names, shapes and dtypes against the family's. Raises ArchiveInvalid that names the tensor."""
    if tensors.keys() != parameters.keys():
        missing = sorted(parameters.keys() - tensors.keys())
        extra = sorted(tensors.keys() - parameters.keys())
        raise ArchiveInvalid(f"weights: tensors missing {missing}, not of this architecture and config {extra}")
    for name, shape in parameters.items():
        tensor = tensors[name]
        if tensor.shape != shape or tensor.dtype != np.float32:
            found = f"{tensor.dtype} {list(tensor.shape)}"
            raise ArchiveInvalid(f"weights: tensor {name!r} must be float32 {list(shape)}, not {found}")


def check_finite(row: Float32, tensors: Mapping[str, Float32]) -> None:
    """The row has no NaN or infinity. Raises ArchiveInvalid that names the tensor it came from."""
    if not np.isfinite(row).all():
        culprits = [name for name, tensor in tensors.items() if not np.isfinite(tensor).all()]
        raise ArchiveInvalid(f"weights: not finite: {', '.join(culprits) or 'the folded biases overflow float32'}")

"""The layout of the flat row of a model: the places of its parts, and the checks and writing of tensors."""

from collections.abc import Mapping
from math import prod

import numpy as np
import torch

from handlers.base import Float32, Shape
from model_store.errors import ArchiveInvalid

ALIGN = 16  #: floats: every part starts on a 64-byte cache line


class Layout:
    """Named parts of a flat float32 row, each aligned to 16 floats, with zeros between them."""

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
        """Return writable views of the parts of one row [row_floats]."""
        return {name: row[start:end].reshape(shape) for name, (start, end, shape) in self._places.items()}

    def views(self, block: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return views [B, *shape] of the parts of rows [B, row_floats]."""
        rows = block.shape[0]
        return {name: block[:, start:end].view(rows, *shape) for name, (start, end, shape) in self._places.items()}


class Rows:
    """A family whose models are flat rows. A subclass adds `reference`, `bind` and `forward`.

    `parameters` are the shapes of the state dict, `parts` those of the row; they are equal for unchanged tensors.
    """

    input_name = "x"

    def __init__(
        self,
        key: str,
        input_shape: Shape,
        output_shape: Shape,
        parameters: Mapping[str, Shape],
        parts: Mapping[str, Shape],
    ) -> None:
        self.key = key
        self.input_shape = self.read_shape = input_shape
        self.output_shape = output_shape
        self.parameters = parameters
        self._layout = Layout(parts)
        self.row_floats = self._layout.row_floats

    def __repr__(self) -> str:
        """For example `<Tcn tcn-4f1c2a9b (8, 168) -> (24, 5), 17408 floats>`."""
        name = type(self).__name__
        return f"<{name} {self.key} {self.input_shape} -> {self.output_shape}, {self.row_floats} floats>"

    @np.errstate(over="ignore", invalid="ignore")  # numbers that are not finite are refused at the end
    def row(self, tensors: Mapping[str, Float32]) -> Float32:
        """Make the flat row [row_floats] of a state dict; see Family.row."""
        check_tensors(self.parameters, tensors)
        row = np.zeros(self.row_floats, np.float32)
        self._fill(self._layout.arrays(row), tensors)
        check_finite(row, tensors)
        return row

    def _fill(self, part: Mapping[str, Float32], tensors: Mapping[str, Float32]) -> None:
        """Write tensors into the parts of a row, here unchanged."""
        for name, each in part.items():
            each[...] = tensors[name]


def check_tensors(parameters: Mapping[str, Shape], tensors: Mapping[str, Float32]) -> None:
    """Check names, shapes and dtypes of tensors. Raises ArchiveInvalid that names the tensor."""
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
    """Check that a row has no NaN or infinity. Raises ArchiveInvalid that names the tensor."""
    if not np.isfinite(row).all():
        culprits = [name for name, tensor in tensors.items() if not np.isfinite(tensor).all()]
        raise ArchiveInvalid(f"weights: not finite: {', '.join(culprits) or 'the folded biases overflow float32'}")

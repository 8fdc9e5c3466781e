"""Seeded values for a model's inputs, of every datatype of the Open Inference Protocol, as JSON or as bytes. Pure."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from loadtest.driver.grpc_messages import DTYPES, narrow_to_bf16, pack_texts

DIGITS = 4  #: decimal digits of the numbers in a tensor body
FP32 = "FP32"
_FLOATS = ("FP16", "BF16", FP32, "FP64")


@dataclass(frozen=True, slots=True, eq=False)
class DrawnTensor:
    """The values of one row of an input. Those of BF16 are float32 here, those of BYTES are text."""

    datatype: str
    values: npt.NDArray[Any]

    def nest(self) -> Any:
        """The values as nested lists of JSON; floats have DIGITS decimals."""
        if self.datatype in _FLOATS:
            return self.values.astype(np.float64).round(DIGITS).tolist()
        return self.values.tolist()

    def list_values(self) -> list[Any]:
        """The same in one list."""
        return DrawnTensor(self.datatype, self.values.ravel()).nest()  # type: ignore[no-any-return]

    def pack(self) -> bytes:
        """The values as binary data of the protocol."""
        if self.datatype == "BYTES":
            return pack_texts(self.values.ravel().tolist())
        if self.datatype == "BF16":
            return narrow_to_bf16(self.values)
        return self.values.astype(DTYPES[self.datatype]).tobytes()


def draw_tensor(datatype: str, shape: tuple[int, ...], seed: int) -> DrawnTensor:
    """Draw normal numbers; of whole numbers, booleans and texts 0 and 1, which are also places in most tables."""
    rng = np.random.default_rng(seed)
    if datatype in _FLOATS:
        return DrawnTensor(datatype, rng.normal(size=shape).astype(np.float32))
    bits = rng.integers(0, 2, size=shape)
    if datatype == "BYTES":
        return DrawnTensor(datatype, bits.astype(str).astype(object))
    return DrawnTensor(datatype, bits.astype(np.bool_ if datatype == "BOOL" else np.int64))

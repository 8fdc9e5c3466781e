# Types of the compiled reader, _quick_numbers.c; see handlers/codecs/quick_numbers.py.

from handlers.base import Float32

def read_tensors(
    body: bytes, names: tuple[bytes, ...], shapes: tuple[tuple[int, ...], ...], /
) -> tuple[tuple[bytearray, tuple[int, ...]], ...] | None: ...
def are_finite(numbers: Float32, /) -> bool: ...

"""A seeded mutator: sound inputs, changed the way a fuzzer changes them. The same seed gives the same inputs."""

import random
from collections.abc import Sequence

#: Pieces that parsers stumble over: limits of integers, deep nesting, odd numbers of JSON, ends of text.
TOKENS = (
    b"\x00", b"\xff", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\x80\x00\x00\x00", b"\x00" * 8, b"\xff" * 9 + b"\x01",
    b"[" * 500, b'{"a":' * 200, b"]" * 50, b"1e999", b"-1e-999", b"NaN", b"Infinity", b"1" * 400, b"null", b"\\u0000",
    b"\\ud800", b"\xed\xa0\x80", b"\xc3", b"..", b"/", b"\\", b"\r\n", b"\r\n\r\n", b": ", b"%s%n", b"true",
    b"-0", b'"',
)  # fmt: skip
MOST_CHANGES = 8
MOST_BYTES = 4 * 1024 * 1024  #: of a mutated input


def mutate(sound: Sequence[bytes], seed: int) -> bytes:
    """One of the sound inputs with one to MOST_CHANGES changes."""
    random_numbers = random.Random(seed)
    data = bytearray(random_numbers.choice(sound))
    for _ in range(random_numbers.randint(1, MOST_CHANGES)):
        _change(data, random_numbers, sound)
    return bytes(data[:MOST_BYTES])


def _change(data: bytearray, numbers: random.Random, sound: Sequence[bytes]) -> None:
    """Flip, cut, repeat, overwrite, insert, or splice with another input."""
    at = numbers.randrange(len(data) + 1)
    end = min(len(data), at + numbers.choice((1, 2, 4, 16, 256, 4096)))
    kind = numbers.randrange(6)
    if kind == 0 and at < len(data):
        data[at] ^= 1 << numbers.randrange(8)
    elif kind == 1:
        del data[at:end]
    elif kind == 2:
        data[at:at] = data[at:end] * numbers.choice((1, 2, 7, 100))
    elif kind == 3:
        token = numbers.choice(TOKENS)
        data[at : at + len(token)] = token
    elif kind == 4:
        data[at:at] = numbers.choice(TOKENS)
    else:
        other = numbers.choice(sound)
        data[at:] = other[numbers.randrange(len(other) + 1) :]

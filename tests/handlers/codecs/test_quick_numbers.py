"""The compiled reader has the bits of the slower ones for what it reads, and gives everything else back."""

import json
import random
from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from handlers.base import Shape
from handlers.codecs import quick_numbers, tensors
from handlers.codecs.quick_numbers import are_finite
from handlers.codecs.tensors import read_plain
from handlers.errors import RequestError

pytestmark = pytest.mark.skipif(
    not quick_numbers.IS_COMPILED, reason="the reader was not compiled: no C compiler was found at the installation"
)

#: Plain numbers, which are read here: the ones whose rounding, sign or form is at an edge are among them.
PLAIN = [
    *(
        "0",
        "-0",
        "0.0",
        "-0.0",
        "7",
        "-7",
        "0.1",
        "0.5",
        "-12.345",
        "1e5",
        "1E-7",
        "2.5e+10",
        "-1.25e-05",
        "1.17549435",
    ),
    *("1.17549435", "16777217", "16777219.0", "8388609.5", "99999999.5", "123456.78901234567", "0.30000001192092896"),
    *("-0.0010000000474974513", "9007199254740993", "900719925474099.3", "3402823466385288598"),
    *("0.00000000000000000001", "12345678.12345678", "99999999.99999999"),
]
#: Numbers that are given back: they are read by other means, or refused there.
UNUSUAL = [
    *("3.4028236e38", "1e400", "12345678901234567890", "1e23", "0." + "1" * 30, "1e-30", "1e", "1e+", "1.5e5.5"),
    *("01", "-01.5", "1.", ".5", "+1", "--1", "- 1", "0x10", "1_000", "NaN", "Infinity", "null", "true", '"1"'),
    *("[]", "{}", "1.2.3", "1.2-3", "1-2.5", "1,", "1 2", ""),
]


def read_slowly(body: bytes, shapes: Mapping[str, Shape]) -> dict[str, tuple[Shape, bytes]] | str:
    """What the readers without the compiled part make of a body: shapes and bits, or the message that refuses it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensors, "read_tensors", lambda *_: None)
        try:
            found = tensors.read_json(body, shapes)
        except RequestError as error:
            return error.message
    assert found is not None, "there are no instances in it"
    return {name: (array.shape, array.tobytes()) for name, array in found.items()}


def read_quickly(body: bytes, shapes: Mapping[str, Shape]) -> dict[str, tuple[Shape, bytes]] | None:
    """Shapes and bits of the compiled reader; None if it has given the body back."""
    found = read_plain(body, shapes)
    return None if found is None else {name: (array.shape, array.tobytes()) for name, array in found.items()}


@pytest.mark.parametrize("number", PLAIN)
@pytest.mark.parametrize("padding", ["", " "])
def test_plain_numbers_are_read_to_the_same_bits(number: str, padding: str) -> None:
    """Alone and among others, with a comma or a bracket behind, or white space before it."""
    body = f'{{"x": [{number}{padding}, 1.5, {number}{padding}]}}'.encode()
    found = read_quickly(body, {"x": (3,)})
    assert found is not None
    assert found == read_slowly(body, {"x": (3,)})


@pytest.mark.parametrize("number", UNUSUAL)
def test_other_numbers_are_given_back(number: str) -> None:
    """Wherever they are; a body that ends with one does too."""
    for text in (f"[{number}, 1.5]", f"[1.5, {number}]", f"[{number},1]"):
        assert read_plain(f'{{"x": {text}}}'.encode(), {"x": (2,)}) is None


@given(
    st.lists(
        st.one_of(
            st.floats(width=32, allow_nan=False, allow_infinity=False).map(repr),
            st.floats(-1e6, 1e6).map(repr),
            st.integers(-(10**20), 10**20).map(str),
            st.decimals(-(10**6), 10**6, places=4).map(str),
            st.tuples(st.integers(-(10**9), 10**9), st.integers(0, 10**12)).map(lambda pair: f"{pair[0]}.{pair[1]}"),
            st.tuples(st.integers(0, 10**17), st.integers(-30, 30)).map(lambda pair: f"{pair[0]}e{pair[1]}"),
            st.integers(0, 2**24).map(lambda n: repr((n + 0.5) * 2.0 ** -random.Random(n).randrange(40))),  # ties
        ),
        min_size=1,
        max_size=12,
    )
)
@example(["9007199254740993.0"])
@example(["16777217.000000000001", "16777217"])
@example(["0.000000000000000000000001"])
def test_any_number_has_the_bits_of_the_slower_readers(numbers: list[str]) -> None:
    """Whatever is read here is what simdjson or the careful path reads."""
    body = f'{{"x": [{", ".join(numbers)}]}}'.encode()
    found = read_quickly(body, {"x": (-1,)})
    assert found is None or found == read_slowly(body, {"x": (-1,)})


@pytest.mark.slow
@given(st.data())
def test_any_change_of_a_body_is_read_alike_or_given_back(data: st.DataObject) -> None:
    """A byte changed, put in or taken out, and a body cut anywhere: the same numbers, or the slower readers' word."""
    shapes = {"x": (2, -1), "y": (-1,)}
    body = bytearray(b'{"x": [[1.25, -2], [0.5,4e1]], "y" : [3, 12345.678]}')
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(body) - 1))
        new = data.draw(st.sampled_from(b'0123456789.-+eE,[]{}" \n\x00nxy\xff'))
        body[at : at + data.draw(st.integers(0, 1))] = bytes([new]) * data.draw(st.integers(0, 1))
    text = bytes(body)
    found = read_quickly(text, shapes)
    assert found is None or found == read_slowly(text, shapes)


def test_a_body_that_ends_early_is_given_back() -> None:
    """Each beginning of a body, with and without the brace that the reader looks for at the end."""
    body = b'{"x": [[1.25, -2.5], [0.5, 4.125]]}'
    for size in range(len(body)):
        assert read_plain(body[:size], {"x": (2, 2)}) is None
        assert read_plain(body[:size] + b"}", {"x": (2, 2)}) is None or size == len(body) - 1


@pytest.mark.parametrize(
    "body",
    [
        '{"x": [[1, 2], [3]]}',
        '{"x": [[1, 2], [3, 4], [5, 6]]}',
        '{"x": [[1, 2, 3], [4, 5, 6]]}',
        '{"x": [1, 2, 3, 4]}',
        '{"x": [[[1, 2]], [[3, 4]]]}',
        '{"x": [[1, 2], [3, 4]], "x": [[1, 2], [3, 4]]}',
        '{"x": [[1, 2], [3, 4]], "y": 1}',
        '{"y": [[1, 2], [3, 4]]}',
        '{"xx": [[1, 2], [3, 4]]}',
        '{"": [[1, 2], [3, 4]]}',
        '{"\\u0078": [[1, 2], [3, 4]]}',
        '{"x": [[1, 2], [3, 4]]}}',
        '{"x": [[1, 2], [3, 4],]}',
        '{"x": [[], []]}',
        '{"x": []}',
        '{"instances": []}',
        "[[1, 2], [3, 4]]",
        "{}",
        "}",
        "",
    ],
)
def test_other_shapes_and_objects_are_given_back(body: str) -> None:
    """Whether they are wrong or only unusual."""
    assert read_plain(body.encode(), {"x": (2, 2)}) is None


def test_a_name_that_json_writes_otherwise_is_not_compared_here() -> None:
    """A quote in a name would end it: such an archive's requests are read by the other paths."""
    assert read_plain(b'{"a"b": [1]}', {'a"b': (1,)}) is None
    assert tensors.read_json(b'{"a\\"b": [1]}', {'a"b': (1,)})['a"b'].tolist() == [1.0]  # type: ignore[index]
    found = read_plain('{"größe": [1]}'.encode(), {"größe": (1,)})
    assert found is not None
    assert found["größe"].tolist() == [1.0]


def test_several_tensors_in_any_order_and_free_lengths() -> None:
    """A length that the shape leaves open is that of the first list, which the others must have."""
    shapes: dict[str, Shape] = {"x": (-1, 2), "y": (3,)}
    found = read_plain(b' {"y":[1,2,3],"x" :\n[[1,2],[3,4],\t[5,6]]} \n', shapes)
    assert found is not None
    assert list(found) == ["x", "y"]
    assert found["x"].tolist() == [[1, 2], [3, 4], [5, 6]]
    found["x"][0, 0] = 9.0  # it can be written, as torch wants its inputs
    assert read_plain(b'{"x": [[1,2],[3]], "y": [1,2,3]}', shapes) is None


@pytest.mark.slow
def test_a_large_body_has_as_much_memory_as_its_numbers() -> None:
    """Also where the lengths are open, and more is taken while it is read."""
    numbers = [round(random.Random(i).uniform(-99, 99), 3) for i in range(50_000)]
    found = read_plain(json.dumps({"x": numbers}).encode(), {"x": (-1,)})
    assert found is not None
    assert found["x"].tobytes() == np.array(numbers, np.float32).tobytes()
    assert found["x"].base.nbytes == 4 * len(numbers)  # type: ignore[union-attr]
    assert read_plain(b'{"x": [1]}', {"x": (2**62, 4)}) is None


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), float("-inf")])
def test_a_number_that_is_not_finite_is_found_anywhere(wrong: float) -> None:
    """In each place of arrays of several lengths; the largest finite numbers are finite."""
    for size in (1, 7, 16, 33):
        numbers = np.full(size, np.finfo(np.float32).max, np.float32)
        assert are_finite(numbers)
        for at in range(size):
            spoilt = numbers.copy()
            spoilt[at] = wrong
            assert not are_finite(spoilt)


def test_only_contiguous_float32_is_checked() -> None:
    """Another array would be read as other numbers: it is refused, not misread."""
    with pytest.raises((ValueError, BufferError)):
        are_finite(np.zeros((4, 4), np.float32)[:, ::2])
    with pytest.raises(ValueError, match="float32"):
        are_finite(np.zeros(4, np.float64))

"""`graph.json`: a network as a list of ATen operators. Pure: bytes in, frozen records out, and back. No torch.

A graph answers one request: x [1, *shape] -> [1, *answer]. Its nodes run in order, and a node refers only to what is
before it, so there are no cycles and no code. Numbers that training changes are not here: a `parameter` is a name and a
shape, and its values are the archive's tensors.
"""

import hashlib
from collections.abc import Iterator
from math import prod
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from model_store.archives.manifest import GRAPH_FILE, count_values
from model_store.errors import ArchiveInvalid

MAX_ITEMS = 1 << 30  #: of a parameter or the input
MAX_CONSTANT_ITEMS = 65_536  #: of all constants together

Name = Annotated[str, Meta(min_length=1, max_length=200)]
Int64 = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
Size = Annotated[int, Meta(ge=1, le=2**31)]
Sizes = Annotated[tuple[Size, ...], Meta(max_length=8)]


class Named(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What JSON has no word for: the tensor of that name, a dtype (`float32`), or a number (`inf`, `-inf`, `nan`)."""

    kind: Literal["tensor", "dtype", "number"]
    name: Name


Leaf = None | bool | Int64 | float | Annotated[str, Meta(max_length=40)] | Named
Arg = Leaf | Annotated[list[Leaf], Meta(max_length=4096)]  #: one level of lists is all that operators take


class Node(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`name` is what the operator `op` gives for these arguments: a tensor, or several, which `getitem` takes apart."""

    name: Name
    op: Annotated[str, Meta(max_length=100)]
    args: Annotated[tuple[Arg, ...], Meta(max_length=32)]
    kwargs: Annotated[dict[Annotated[str, Meta(max_length=40)], Arg], Meta(max_length=16)] = {}

    def refers_to(self) -> Iterator[str]:
        """The tensors it reads, by name."""
        for arg in (*self.args, *self.kwargs.values()):
            for leaf in arg if isinstance(arg, list) else (arg,):
                if isinstance(leaf, Named) and leaf.kind == "tensor":
                    yield leaf.name


class Constant(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A small tensor of whole numbers or truth values (0, 1) that belongs to the architecture."""

    dtype: Literal["bool", "int64"]
    shape: Sizes
    data: Annotated[tuple[Int64, ...], Meta(max_length=MAX_CONSTANT_ITEMS)]

    def __post_init__(self) -> None:
        """Cross-field rules."""
        if prod(self.shape) != len(self.data):
            raise ValueError(f"shape {list(self.shape)} needs {prod(self.shape)} items, but data has {len(self.data)}")


class Input(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The tensor a request brings: float32, `shape` without the batch axis."""

    name: Name
    shape: Annotated[Sizes, Meta(min_length=1)]


class Graph(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The whole file. `output` names the tensor that is the answer."""

    input: Input
    parameters: Annotated[dict[Name, Sizes], Meta(max_length=10_000)]
    nodes: Annotated[tuple[Node, ...], Meta(max_length=20_000)]
    output: Name
    constants: Annotated[dict[Name, Constant], Meta(max_length=1000)] = {}
    format: Literal[1] = 1

    def __post_init__(self) -> None:
        """Cross-field rules: every name is given once, and before it is used."""
        for name, shape in ((self.input.name, self.input.shape), *self.parameters.items()):
            if prod(shape) > MAX_ITEMS:
                raise ValueError(f"{name!r} of shape {list(shape)} has more than {MAX_ITEMS} numbers")
        items = sum(len(constant.data) for constant in self.constants.values())
        if items > MAX_CONSTANT_ITEMS:
            raise ValueError(f"constants hold {items} items together, more than {MAX_CONSTANT_ITEMS}")
        known = {self.input.name}
        for name in (*self.parameters, *self.constants):
            _define_name(name, known)
        for node in self.nodes:
            for name in node.refers_to():
                if name not in known:
                    raise ValueError(f"node {node.name!r} refers to {name!r}, which nothing before it gives")
            _define_name(node.name, known)
        if self.output not in known:
            raise ValueError(f"output {self.output!r} is given by no node")

    @property
    def digest(self) -> str:
        """Of the content, whatever the spaces and the order of fields in the file: 16 hexadecimal digits."""
        return hashlib.sha256(encode_graph(self)).hexdigest()[:16]


def parse_graph(raw: bytes) -> Graph:
    """`graph.json`. Raises ArchiveInvalid that names the field."""
    count_values(raw, GRAPH_FILE)
    try:
        return msgspec.json.decode(raw, type=Graph)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ArchiveInvalid(f"{GRAPH_FILE}: {error}") from error


def encode_graph(graph: Graph) -> bytes:
    """The record as deterministic JSON: equal records give equal bytes."""
    return msgspec.json.encode(graph, order="deterministic")


def _define_name(name: str, known: set[str]) -> None:
    if name in known:
        raise ValueError(f"the name {name!r} is given twice")
    known.add(name)

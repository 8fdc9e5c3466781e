"""Looks through the protobuf of an ONNX model, in bounded steps, for what must not be loaded. Pure."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping

from model_store.archives.container import quote_name
from model_store.archives.step_budget import StepBudget
from model_store.errors import ArchiveInvalid

CallName = tuple[bytes, bytes]  #: domain and name of an operator or function
#: Where tensors can be in a model: message -> {field number: the message it holds} (onnx.proto of ONNX 1.23).
MESSAGES: Mapping[str, Mapping[int, str]] = {
    "Model": {7: "Graph", 20: "Training", 25: "Function"},
    "Training": {1: "Graph", 2: "Graph"},
    "Graph": {1: "Node", 5: "Tensor", 15: "Sparse"},
    "Function": {7: "Node", 11: "Attribute"},
    "Node": {5: "Attribute"},
    "Attribute": {5: "Tensor", 6: "Graph", 10: "Tensor", 11: "Graph", 22: "Sparse", 23: "Sparse"},
    "Sparse": {1: "Tensor", 2: "Tensor"},
    "Tensor": {},
}
EXTERNAL_DATA, DATA_LOCATION = 13, 14  #: fields of Tensor; location 0 is inside the model
MAX_FIELDS = 200_000  #: that a scan looks at: some 10 for each node or tensor
#: Nodes, attributes and tensors: ONNX Runtime holds the interpreter while it reads them, some microseconds for each.
MAX_PARTS = 16_000
MAX_SCALAR_BYTES = 32 * 2**20  #: of fields that a scan skips
SCALARS_AT_ONCE = 64 * 1024  #: bytes: the interpreter is held for half a millisecond
#: A run of varint, fixed 64-bit and fixed 32-bit fields numbered 1 to 15. Possessive, so that it never goes back.
SCALARS = re.compile(
    rb"(?:[%b][\x80-\xff]{0,9}[\x00-\x7f]|[%b].{8}|[%b].{4})++"
    % tuple(re.escape(bytes(number << 3 | wire for number in range(1, 16))) for wire in (0, 1, 5)),
    re.DOTALL,
)
#: Operators that run a graph of theirs as often as a number says, which a request may give: a model of 380 bytes
#: would run for years. `If` runs one of its graphs once.
LOOPS = frozenset({b"Loop", b"Scan", b"SequenceMap"})
FUNCTION_NAME, NODE_NAME = {10: 0, 1: 1}, {7: 0, 4: 1}  #: fields that hold a domain (0) and a name (1)
OP_TYPE, DIMS = 4, 3  #: fields of Node and Sparse
MOST_SPARSE = 1 << 24  #: numbers of a sparse tensor once ONNX Runtime has made it dense, as it does at load
VARINT, BYTES, FIXED = 0, 2, {1: 8, 5: 4}  #: protobuf wire types; of the last, the length
NOT_A_MODEL = "model.onnx: not an ONNX model: its protobuf encoding is broken or cut off"


def check_model(model: bytes, *, loops: bool = False) -> bool:
    """Whether the model has loops.

    Raises ArchiveInvalid where a tensor names a file or is too large, for a loop unless allowed, for functions that
    become too many nodes, and for no message.

    ONNX Runtime 1.31 refuses external data of a model given as bytes too, but how has changed between its versions, so
    we look for ourselves: at every place the format has for a tensor, without unpacking any. Raises ArchiveTooLarge
    where that takes more steps than a sound model's.
    """
    scan = _Scan(loops=loops)
    todo = [("Model", memoryview(model), scan.main)]
    while todo:
        todo += scan.read_message(*todo.pop())
    require_inlinable(scan.main, {(body.name[0], body.name[1]): body for body in scan.functions}, MAX_PARTS)
    return scan.has_loops


class _Scan:
    """What is found in a model's messages, one after the other."""

    def __init__(self, *, loops: bool) -> None:
        self.main, self.functions, self.has_loops = FunctionBody(), list[FunctionBody](), False
        self._loops = loops
        self._fields = StepBudget(MAX_FIELDS, "fields of an ONNX model")
        self._parts = StepBudget(MAX_PARTS, "nodes, attributes and tensors of an ONNX model")
        self._scalars = StepBudget(MAX_SCALAR_BYTES, "bytes of single numbers in an ONNX model")

    def read_message(
        self, kind: str, message: memoryview, body: "FunctionBody"
    ) -> list[tuple[str, memoryview, "FunctionBody"]]:
        """The messages in a message, each with its kind and the function that it belongs to. Raises as check_model."""
        inner, at = list[tuple[str, memoryview, FunctionBody]](), 0
        if kind == "Function":
            body = FunctionBody()
            self.functions.append(body)
        state = _MessageState(body)
        while True:
            if kind not in ("Tensor", "Sparse"):  # their numbers are told apart: a data's location, the dimensions
                at = _skip_scalars(message, at, self._scalars)
            if at >= len(message):
                break
            self._fields.spend()
            field, value, at = _field(message, at)
            if kind in _LOOKS:
                _LOOKS[kind](self, state, field, value)
            held = MESSAGES[kind].get(field)
            if held is not None and isinstance(value, memoryview):
                self._parts.spend()
                inner.append((held, value, body))
        if kind == "Node":
            body.calls[state.node[0], state.node[1]] += 1
        return inner

    def look_at_tensor(self, state: "_MessageState", field: int, value: memoryview | int) -> None:
        """Its data must be in the model. Raises ArchiveInvalid."""
        del state
        if field == EXTERNAL_DATA or (field == DATA_LOCATION and value != 0):
            raise ArchiveInvalid("model.onnx: a tensor is in an external file; save the model as a single file")

    def look_at_node(self, state: "_MessageState", field: int, value: memoryview | int) -> None:
        """Its operator may be a loop. Raises ArchiveInvalid unless these are allowed."""
        if field not in NODE_NAME:
            return
        state.node[NODE_NAME[field]] = name = bytes(_bytes_of(value))
        if field == OP_TYPE and name in LOOPS:
            self.has_loops = True
            if not self._loops:
                what = f"it has the operator {name.decode()}, whose time no size bounds"
                raise ArchiveInvalid(f"model.onnx: {what}; export it unrolled, or set onnx_control_flow to allow")

    def look_at_function(self, state: "_MessageState", field: int, value: memoryview | int) -> None:
        """Its name. Raises ArchiveInvalid."""
        if field in FUNCTION_NAME:
            state.body.name[FUNCTION_NAME[field]] = bytes(_bytes_of(value))

    def look_at_sparse(self, state: "_MessageState", field: int, value: memoryview | int) -> None:
        """Its size once it is dense. Raises ArchiveInvalid."""
        if field == DIMS:
            state.dense = _dense_size(state.dense, value, self._fields)


_LOOKS = {
    "Tensor": _Scan.look_at_tensor,
    "Node": _Scan.look_at_node,
    "Function": _Scan.look_at_function,
    "Sparse": _Scan.look_at_sparse,
}


class _MessageState:
    """What was read of one message until now: a node's domain and operator, a sparse tensor's size."""

    def __init__(self, body: "FunctionBody") -> None:
        self.body, self.node, self.dense = body, [b"", b""], 1


class FunctionBody:
    """What a function of a model, or its main graph, calls: how often each operator or function, by domain and name."""

    def __init__(self) -> None:
        self.name = [b"", b""]  #: domain and name
        self.calls: Counter[CallName] = Counter()

    def __repr__(self) -> str:
        return f"<FunctionBody {self.name}, {self.calls.total()} calls>"


def require_inlinable(main: FunctionBody, functions: Mapping[CallName, FunctionBody], most: int) -> None:
    """Check that a model has at most so many nodes once each function's nodes stand in the place of its calls.

    ONNX Runtime does that at load: thirty functions that call each other twice would become a billion nodes. Each
    body is looked at twice. Raises ArchiveInvalid with the number, and for functions that call themselves.
    """
    sizes: dict[CallName, int] = {}
    todo, opened = list(functions), set[CallName]()
    while todo:
        name = todo[-1]
        missing = [called for called in functions[name].calls if called in functions and called not in sizes]
        if name in sizes or not missing:
            sizes[name] = sizes.get(name) or _count_nodes(functions[name], sizes)
            todo.pop()
        elif name in opened:
            raise ArchiveInvalid(
                f"model.onnx: the function {quote_name(name[1].decode(errors='replace'))} calls itself"
            )
        else:
            opened.add(name)
            todo += missing
    if (size := _count_nodes(main, sizes)) > most:
        raise ArchiveInvalid(f"model.onnx: with its functions in place it has {size} nodes, {most} are allowed")


def _count_nodes(body: FunctionBody, sizes: Mapping[CallName, int]) -> int:
    return sum(count * sizes.get(called, 1) for called, count in body.calls.items())


def _dense_size(before: int, dims: memoryview | int, budget: StepBudget) -> int:
    """Numbers of a sparse tensor with these further dimensions, once it is dense. Raises ArchiveInvalid."""
    size = before
    for dim in _integers(dims):
        budget.spend()
        size *= dim
        if size > MOST_SPARSE:
            what = f"a sparse tensor of {size} numbers"
            raise ArchiveInvalid(f"model.onnx: {what} becomes dense at load; {MOST_SPARSE} are allowed")
    return size


def _skip_scalars(message: memoryview, at: int, budget: StepBudget) -> int:
    """Where the run of fields that are single numbers ends which starts at `at`: tree ensembles have a million."""
    while (run := SCALARS.match(message, at, at + SCALARS_AT_ONCE)) is not None:
        budget.spend(run.end() - at)
        at = run.end()
    return at


def _field(message: memoryview, at: int) -> tuple[int, memoryview | int, int]:
    """The number of the protobuf field at `at`, its bytes or integer, and where it ends. Raises ArchiveInvalid."""
    tag, at = _read_varint(message, at)
    number, wire = tag >> 3, tag & 7
    if number == 0 or tag >> 32:
        raise ArchiveInvalid(NOT_A_MODEL)
    if wire == VARINT:
        value, at = _read_varint(message, at)
        return number, value, at
    length = FIXED.get(wire, len(message))  # beyond the end for groups, which are in no ONNX file
    if wire == BYTES:
        length, at = _read_varint(message, at)
    if length > len(message) - at:
        raise ArchiveInvalid(NOT_A_MODEL)
    return number, message[at : at + length], at + length


def _bytes_of(value: memoryview | int) -> memoryview:
    """The field's bytes. Raises ArchiveInvalid for an integer."""
    if isinstance(value, int):
        raise ArchiveInvalid(NOT_A_MODEL)
    return value


def _integers(value: memoryview | int) -> Iterator[int]:
    """A repeated field's integers: one, or several packed together. Raises ArchiveInvalid."""
    if isinstance(value, int):
        yield value
        return
    at = 0
    while at < len(value):
        found, at = _read_varint(value, at)
        yield found


def _read_varint(message: memoryview, at: int) -> tuple[int, int]:
    """The integer at `at` and where it ends. Raises ArchiveInvalid."""
    value = 0
    for shift, byte in zip(range(0, 70, 7), message[at : at + 10], strict=False):
        value |= (byte & 127) << shift
        if byte < 128:  # noqa: PLR2004 - the last byte has no high bit
            return value, at + shift // 7 + 1
    raise ArchiveInvalid(NOT_A_MODEL)

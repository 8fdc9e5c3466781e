"""Turns a graph into a list of calls: checks it on meta tensors, and computes the part that does not depend on inputs.

Nothing here trusts the graph. Every operator is looked up by name in the table of those allowed, and the whole graph is
run on tensors that have shapes and no numbers before any memory is taken for it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import inf, nan
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

from handlers.kinds.graph.operators import (
    FACTORIES,
    GETITEM,
    INDEX_ARGUMENTS,
    check_arguments,
    check_tensors,
    choose_precision,
    find_batched_operator,
    find_operator,
)
from handlers.kinds.graph.schema import Arg, Constant, Graph, Named, Node
from model_store.archives.manifest import GRAPH_FILE
from model_store.errors import ArchiveInvalid

#: What one request may cost: numbers in all results together (128 MB), arithmetic (a second of one core), and calls of
#: torch, of which a recurrence makes some for every step of its context.
MAX_ELEMENTS, MAX_FLOPS, MAX_CALLS = 1 << 25, 20_000_000_000, 100_000
MAX_KEPT = 1 << 20  #: numbers that do not depend on a request or a model, kept with the family

_DTYPES = {name: getattr(torch, name) for name in ("bool", "float32", "float64", "int32", "int64")}
_NUMBERS = {"inf": inf, "-inf": -inf, "nan": nan}


_Arguments = tuple[list[Any], dict[str, Any]]  # by position and by name


class TensorSlot(int):
    """The place of a tensor among a run's values."""


class OperatorCall(NamedTuple):
    """`run(*args, **kwargs)` with values for slots goes to `slot`; the values of `dies` are not needed afterwards."""

    op: str
    run: Callable[..., Any]
    args: list[Any]
    kwargs: dict[str, Any]
    slot: int
    dies: tuple[int, ...]


class Program:
    """x [1, *shape] -> the answer [1, *answer_shape], for parameters given at every run. Immutable."""

    def __init__(self, graph: Graph) -> None:
        """Raises ArchiveInvalid that names the node which is not allowed, cannot run, or costs too much."""
        self.parameters = sorted(graph.parameters)  # their order must not depend on the order in the file
        fixed = _constant_names(graph)
        for node in graph.nodes:
            _check_node(node, fixed)
        self.answer_shape, self.elements = _measure_graph(graph)
        live = _find_needed(graph, fixed)
        values = _fold_constants(graph, fixed)
        if (kept := sum(value.numel() for name, value in values.items() if name in live)) > MAX_KEPT:
            raise ArchiveInvalid(f"{GRAPH_FILE}: {kept} numbers would be kept that never change, more than {MAX_KEPT}")
        self._constants = [value for name, value in values.items() if name in live]
        names = [graph.input.name, *self.parameters, *(name for name in values if name in live)]
        nodes = [node for node in graph.nodes if node.name in live and node.name not in fixed]
        slots = {name: TensorSlot(slot) for slot, name in enumerate([*names, *(node.name for node in nodes)])}
        self._size, self._output = len(slots), slots[graph.output]
        self._plain = list(_list_calls(nodes, slots, self._output, find_operator))
        self._batched = list(_list_calls(nodes, slots, self._output, find_batched_operator))

    def __repr__(self) -> str:
        return f"<Program {len(self._plain)} operators, {len(self.parameters)} parameters -> {list(self.answer_shape)}>"

    def constants(self, device: torch.device) -> list[torch.Tensor]:
        """What does not depend on a request or a model, computed once."""
        return [constant.to(device) for constant in self._constants]

    def run(self, x: torch.Tensor, fixed: Sequence[torch.Tensor], *, for_vmap: bool = False) -> torch.Tensor:
        """The answer; `fixed` is the parameters in order, and the constants.

        The parameters may be of a shorter precision than x. Then only what is multiplied by them is rounded to it.
        """
        values: list[Any] = [x, *fixed, *[None] * (self._size - 1 - len(fixed))]
        short = fixed[0].dtype if self.parameters and fixed[0].dtype != x.dtype else None
        for op, run, args, kwargs, slot, dies in self._batched if for_vmap else self._plain:
            filled = {key: _fill_slots(arg, values) for key, arg in kwargs.items()} if kwargs else kwargs
            given = [_fill_slots(arg, values) for arg in args]
            if short is not None and (meeting := choose_precision(op, short)) is not None:
                given, filled = _unify_precision((given, filled), meeting)
            values[slot] = run(*given, **filled)
            for dead in dies:
                values[dead] = None
        answer: torch.Tensor = values[self._output]
        return answer


class Meter(TorchDispatchMode):
    """Counts what runs inside it, down to the operators that others are made of. Raises ValueError beyond a limit."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls = self.elements = self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        found = func(*args, **kwargs)
        self.calls += 1
        self.elements += sum(leaf.numel() for leaf in tree_leaves(found) if isinstance(leaf, torch.Tensor))
        if func.overloadpacket in flop_registry:
            self.flops += flop_registry[func.overloadpacket](*args, **kwargs, out_val=found)
        for what, cost, limit in (
            ("numbers in its results", self.elements, MAX_ELEMENTS),
            ("floating-point operations", self.flops, MAX_FLOPS),
            ("calls of torch", self.calls, MAX_CALLS),
        ):
            if cost > limit:
                raise ValueError(f"up to here one request takes {cost} {what}, more than {limit}")
        return found


def _constant_names(graph: Graph) -> set[str]:
    """The tensors that depend neither on the request nor on parameters."""
    fixed = set(graph.constants)
    for node in graph.nodes:
        if fixed.issuperset(node.refers_to()):
            fixed.add(node.name)
    return fixed


def _check_node(node: Node, fixed: set[str]) -> None:
    with _name_node(node):
        check_arguments(node.op, node.args, node.kwargs)
        if node.op in INDEX_ARGUMENTS:
            place = INDEX_ARGUMENTS[node.op]
            index = Node(name="index", op=node.op, args=node.args[place : place + 1])
            if node.kwargs or not fixed.issuperset(index.refers_to()):
                raise ArchiveInvalid("it looks up by numbers that depend on the request or on parameters")


def _measure_graph(graph: Graph) -> tuple[tuple[int, ...], int]:
    """Runs the graph on shapes alone: the answer's shape without batch axis, and the elements one request takes.

    The first time in a process torch imports what it knows about shapes: 0.7 s, 70 MB. Then it takes milliseconds.
    """
    meta = torch.device("meta")
    values: dict[str, Any] = {name: torch.empty(shape, device=meta) for name, shape in graph.parameters.items()}
    values |= {name: _make_tensor(constant).to(meta) for name, constant in graph.constants.items()}
    values[graph.input.name] = torch.empty(1, *graph.input.shape, device=meta)
    with torch.no_grad(), Meter() as meter:
        for node in graph.nodes:
            kwargs = {**node.kwargs, "device": meta} if node.op in FACTORIES else node.kwargs
            values[node.name] = _run_node(node, find_operator, values, kwargs)
    answer = values[graph.output]
    if not isinstance(answer, torch.Tensor) or answer.dtype != torch.float32 or answer.shape[:1] != (1,):
        raise ArchiveInvalid(
            f"{GRAPH_FILE}: output {graph.output!r} must be one float32 tensor [1, ...], not {answer!r}"
        )
    return tuple(answer.shape[1:]), meter.elements


def _fold_constants(graph: Graph, fixed: set[str]) -> dict[str, Any]:
    """The constants, and what follows from them, as tensors."""
    values: dict[str, Any] = {name: _make_tensor(constant) for name, constant in graph.constants.items()}
    with torch.no_grad():
        for node in graph.nodes:
            if node.name in fixed:
                values[node.name] = _run_node(node, find_operator, values, node.kwargs)
    return values


def _find_needed(graph: Graph, fixed: set[str]) -> set[str]:
    """What the answer is made of, up to constants, which are there already."""
    live = {graph.output}
    for node in reversed(graph.nodes):
        if node.name in live and node.name not in fixed:
            live.update(node.refers_to())
    return live


def _run_node(node: Node, lookup: Callable[[str], Callable[..., Any]], values: Mapping[str, Any], kwargs: Any) -> Any:
    """The node's result. Raises ArchiveInvalid that names the node."""
    with _name_node(node):
        if node.op != GETITEM and not all(isinstance(values[name], torch.Tensor) for name in node.refers_to()):
            raise ArchiveInvalid("it takes tensors, and one of its arguments is several: pick one with getitem")
        args = [_resolve_argument(arg, values) for arg in node.args]
        kwargs = {key: _resolve_argument(arg, values) for key, arg in kwargs.items()}
        run = lookup(node.op)
        try:
            check_tensors(node.op, args, kwargs)
            found = run(*args, **kwargs)
        except Exception as error:  # whatever torch, or a lookup of ours, has against these arguments
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise ArchiveInvalid(f"it cannot run: {lines[0]}") from error
        if not all(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(found)):
            raise ArchiveInvalid("it does not give tensors")
        return found


def _list_calls(
    nodes: Sequence[Node], slots: Mapping[str, TensorSlot], output: int, lookup: Callable[[str], Callable[..., Any]]
) -> Iterator[OperatorCall]:
    """The nodes with slots for names; a value dies at its last reader."""
    readers = {slots[name]: node.name for node in nodes for name in node.refers_to()}
    for node in nodes:
        dies = {slot for name in node.refers_to() if readers[slot := slots[name]] == node.name and slot != output}
        kwargs = {key: _resolve_argument(arg, slots) for key, arg in node.kwargs.items()}
        args = [_resolve_argument(arg, slots) for arg in node.args]
        yield OperatorCall(node.op, lookup(node.op), args, kwargs, slots[node.name], tuple(sorted(dies)))


def _resolve_argument(arg: Arg, values: Mapping[str, Any]) -> Any:
    """An argument as torch takes it, `values` standing for tensors."""
    if isinstance(arg, list):
        return [_resolve_argument(each, values) for each in arg]
    if not isinstance(arg, Named):
        return arg
    if arg.kind == "tensor":
        return values[arg.name]
    words: Mapping[str, Any] = _DTYPES if arg.kind == "dtype" else _NUMBERS
    if arg.name not in words:
        raise ArchiveInvalid(f"unknown {arg.kind} {arg.name!r}; known are {', '.join(words)}")
    return words[arg.name]


def _fill_slots(arg: Any, values: Sequence[Any]) -> Any:
    kind = type(arg)
    if kind is TensorSlot:
        return values[arg]
    if kind is list:
        return [_fill_slots(each, values) for each in arg]
    return arg


def _unify_precision(arguments: _Arguments, meeting: torch.dtype) -> _Arguments:
    """The arguments, floats of several precisions in that of their meeting. Whole numbers are what they are."""
    floats = {leaf.dtype for leaf in tree_leaves(arguments) if _is_float(leaf)}
    if len(floats) < 2:  # noqa: PLR2004 -- several
        return arguments
    found: _Arguments = tree_map(lambda leaf: leaf.to(meeting) if _is_float(leaf) else leaf, arguments)
    return found


def _is_float(leaf: object) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.is_floating_point()


def _make_tensor(constant: Constant) -> torch.Tensor:
    return torch.tensor(constant.data, dtype=_DTYPES[constant.dtype]).reshape(constant.shape)


@contextmanager
def _name_node(node: Node) -> Iterator[None]:
    """Puts the node before the message of an error raised inside."""
    try:
        yield
    except ArchiveInvalid as error:
        raise ArchiveInvalid(f"{GRAPH_FILE}: node {node.name!r} ({node.op}): {error}") from error

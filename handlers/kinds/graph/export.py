"""Exports an `nn.Module` as a graph and its tensors. This runs where archives are packed: it executes the module.

`torch.export` writes down which ATen operators one request runs. Those that a graph may hold stay as they are, however
large (`linear`, `scaled_dot_product_attention`); every other one is taken apart until what is left may be held.
"""

import copy
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from torch.export import ExportedProgram, default_decompositions
from torch.export.graph_signature import InputKind
from torch.fx import Node as FxNode
from torch.utils._pytree import tree_leaves

from handlers.base import Float32, Shape
from handlers.kinds.graph.family import ABSOLUTE, RELATIVE, GraphFamily, graph_family
from handlers.kinds.graph.operators import ALLOWED, GETITEM, PLACEMENT, check_arguments
from handlers.kinds.graph.schema import Arg, Constant, Graph, Input, Leaf, Named, Node, encode_graph
from model_store.errors import ArchiveInvalid

TRIALS = 2  #: random requests by which the graph is compared with the module


def export_graph(module: nn.Module, inputs: Mapping[str, Shape]) -> tuple[bytes, dict[str, Float32]]:
    """A module in evaluation mode -> its `graph.json`, and its parameters, buffers and constants by name.

    `inputs` names the argument of `forward` and the shape of one request's row, without the batch axis: {"x": (8, 168)}
    for a module that maps x [N, 8, 168] to one tensor [N, ...]. The module is not changed.

    Raises:
        ArchiveInvalid: the module cannot be exported, holds what a graph may not hold, or the graph does not answer as
            the module does; says which operator.
    """
    if len(inputs) != 1:
        raise ArchiveInvalid(
            f"a graph takes one tensor, not {list(inputs)}: join them along an axis and split them inside"
        )
    ((name, shape),) = inputs.items()
    module = copy.deepcopy(module).cpu().eval().requires_grad_(requires_grad=False)
    exported = _export_program(module, name, shape)
    writer = _Writer(exported)
    raw = encode_graph(writer.graph(name, tuple(shape)))
    made, tensors = graph_family(raw), writer.tensors
    made.decide(made.row(tensors))
    _check_graph(module, made, tensors)
    return raw, tensors


def _export_program(module: nn.Module, name: str, shape: Shape) -> ExportedProgram:
    table: Any = default_decompositions()
    for op in ALLOWED:
        _, packet, overload = op.split(".")
        table.pop(getattr(getattr(torch.ops.aten, packet), overload), None)
    try:
        with _plain_attention(), warnings.catch_warnings(action="ignore"):  # torch's own deprecations
            program = torch.export.export(module, (), {name: torch.zeros(1, *shape)}, strict=False)
            found: ExportedProgram = program.run_decompositions(table)
    except Exception as error:  # whatever torch has against a module is the module's trouble
        first = (str(error).strip().splitlines() or [""])[0]
        raise ArchiveInvalid(
            f"torch.export cannot export {type(module).__name__}: {type(error).__name__}: {first}"
        ) from error
    return found


class _Writer:
    """One exported program being written down; `tensors` fills up on the way."""

    def __init__(self, program: ExportedProgram) -> None:
        self.tensors: dict[str, Float32] = {}
        self._program = program
        self._constants: dict[str, Constant] = {}
        self._names: dict[FxNode, str] = {}

    def graph(self, name: str, shape: Shape) -> Graph:
        """The record. Raises ArchiveInvalid."""
        output = self._output()
        live = _reached_from(output)
        targets = {spec.arg.name: spec for spec in self._program.graph_signature.input_specs}
        nodes: list[Node] = []
        for node in self._program.graph.nodes:
            if node not in live:
                continue
            if node.op == "placeholder":
                spec = targets[node.name]
                self._names[node] = name if spec.kind is InputKind.USER_INPUT else self._number(spec.target)
            else:
                nodes.append(self._node(node, f"n{len(nodes)}"))
        return Graph(
            input=Input(name=name, shape=shape),
            parameters={key: tensor.shape for key, tensor in self.tensors.items()},
            constants=self._constants,
            nodes=tuple(nodes),
            output=self._names[output],
        )

    def _output(self) -> FxNode:
        signature = self._program.graph_signature
        if signature.buffers_to_mutate or signature.user_inputs_to_mutate:
            raise ArchiveInvalid(f"forward writes into {list(signature.buffers_to_mutate.values()) or 'its input'}")
        results = tree_leaves(self._program.graph.output_node().args[0])
        if len(results) != 1 or not isinstance(results[0], FxNode):
            raise ArchiveInvalid(f"forward returns {len(results)} values; a graph gives one tensor [N, ...]")
        found: FxNode = results[0]
        return found

    def _number(self, target: str) -> str:
        """A parameter, buffer or constant of the module -> its name; float32 travels with the weights."""
        known = {**self._program.state_dict, **self._program.constants}
        tensor = known[target].detach()
        if tensor.dtype == torch.float32:
            self.tensors[target] = np.ascontiguousarray(tensor.numpy())
        elif tensor.dtype in (torch.bool, torch.int64) and tensor.numel():
            data = tuple(int(item) for item in tensor.flatten().tolist())
            dtype: Literal["bool", "int64"] = "bool" if tensor.dtype == torch.bool else "int64"
            self._constants[target] = Constant(dtype=dtype, shape=tuple(tensor.shape), data=data)
        else:
            raise ArchiveInvalid(f"{target} is {tensor.dtype} {list(tensor.shape)}; convert the module with .float()")
        return target

    def _node(self, node: FxNode, name: str) -> Node:
        self._names[node] = name
        target: Any = node.target
        op = GETITEM if getattr(target, "__name__", "") == "getitem" else str(target)
        kept = {key: self._arg(arg) for key, arg in node.kwargs.items() if key not in PLACEMENT}
        made = Node(name=name, op=op, args=tuple(self._arg(arg) for arg in node.args), kwargs=kept)
        try:
            check_arguments(op, made.args, made.kwargs)
        except ArchiveInvalid as error:
            raise ArchiveInvalid(f"{error}{_describe_place(node)}") from error
        return made

    def _arg(self, arg: Any) -> Arg:
        return (
            [self._leaf(each) for each in arg]
            if isinstance(arg, Sequence) and not isinstance(arg, str)
            else self._leaf(arg)
        )

    def _leaf(self, arg: Any) -> Leaf:
        if isinstance(arg, FxNode):
            return Named(kind="tensor", name=self._names[arg])
        if isinstance(arg, torch.dtype):
            return Named(kind="dtype", name=str(arg).removeprefix("torch."))
        if isinstance(arg, float) and not math.isfinite(arg):
            return Named(kind="number", name=str(arg))
        if arg is None or isinstance(arg, bool | int | float | str):
            return arg
        raise ArchiveInvalid(f"an argument of type {type(arg).__name__} ({arg!r}) cannot be written into a graph")


def _reached_from(output: FxNode) -> set[FxNode]:
    """The nodes the answer is made of."""
    live, open_ = {output}, [output]
    while open_:
        for node in open_.pop().all_input_nodes:
            if node not in live:
                live.add(node)
                open_.append(node)
    return live


def _describe_place(node: FxNode) -> str:
    """Where in the module the operator comes from, as far as torch knows."""
    modules = list((node.meta.get("nn_module_stack") or {}).values())
    path = modules[-1][0].removeprefix("L['self'].") if modules else ""
    return f" (in {path})" if path else ""


def _check_graph(module: nn.Module, made: GraphFamily, tensors: Mapping[str, Float32]) -> None:
    """The graph, read back, answers as the module."""
    numbers = np.random.default_rng(0)
    bound = made.bind(torch.from_numpy(made.row(tensors))[None])
    for _ in range(TRIALS):
        x = torch.from_numpy(numbers.standard_normal((1, *made.input_shape), np.float32))
        with torch.no_grad():
            expected, found = module(**{made.input_name: x}), made.forward(bound, x)
        expected = tree_leaves(expected)[0]
        if not torch.allclose(found, expected, atol=ABSOLUTE, rtol=RELATIVE, equal_nan=True):
            raise ArchiveInvalid(
                f"the graph's answer differs from the module's by {(found - expected).abs().max():.2g}: does forward "
                "depend on more than its input (a random number, the clock, a branch on a number)?"
            )


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Attention layers are written as their own operators, not as the one fused for inference."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(value=False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(value=before)

"""The family of a graph: models with the same `graph.json`, each a row, run together by `vmap` where that is proved.

`vmap` maps the program of one request over the rows. Whether its answers are those of one model at a time is tried
once, on the first archive's numbers and on others near them. Where they are not, or `vmap` has no rule for an operator
(the fused recurrences of `nn.GRU`, `nn.LSTM`), rows run one by one, and the family says why.
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha256
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import nn
from torch.func import vmap

from handlers.base import Float32, Shape
from handlers.forecasters.row_layout import Layout, check_finite, check_tensors
from handlers.kinds.graph.program import Program
from handlers.kinds.graph.schema import Graph, parse_graph
from model_store.archives.manifest import GRAPH_FILE
from model_store.errors import ArchiveInvalid

ABSOLUTE, RELATIVE = 1e-5, 1e-4  #: how far a batched answer may be from that of one model
#: Numbers in all results of one `vmap`. A GPU takes what memory allows, half a gigabyte at most and far less at a time;
#: a CPU is faster while results stay in its cache: 65 us a request instead of 100 for 512 convolution networks.
MAX_BATCH_ELEMENTS, CPU_BATCH_ELEMENTS = 1 << 27, 1 << 23
MIN_TOGETHER = 4  #: rows that run at once however large they are; times `program.MAX_ELEMENTS` this is the most above
TRIED_ROWS = (2, 5)  #: of the batches by which a family is proved; two sizes, since one may be that of an axis

_deciding = threading.Lock()


class GraphFamily:
    """See the module. Immutable but for `one_by_one`, which the first archive decides."""

    def __init__(self, graph: Graph) -> None:
        """Raises ArchiveInvalid: see Program."""
        self.key = f"graph-{graph.digest}"
        self.graph = graph
        self.program = Program(graph)
        self.input_name = graph.input.name
        self.input_shape: Shape = graph.input.shape
        self.read_shape = self.input_shape  # what a program reads of it is not looked for
        self.output_shape: Shape = self.program.answer_shape
        self.parameters: Mapping[str, Shape] = {name: graph.parameters[name] for name in self.program.parameters}
        self._layout = Layout(self.parameters)
        self.row_floats = max(self._layout.row_floats, 16)  # a network of no parameters still has a place
        #: Why its rows run one by one; empty where they run together, None until the first archive has decided.
        self.one_by_one: str | None = None

    def __repr__(self) -> str:
        return f"<GraphFamily {self.key} {self.input_shape} -> {self.output_shape}, {self.runs}>"

    @property
    def runs(self) -> str:
        """How rows run, for people."""
        if self.one_by_one is None:
            return "not tried yet"
        return f"one by one: {self.one_by_one}" if self.one_by_one else "batched"

    def reference(self) -> nn.Module:
        """The graph as a module of one model, its parameters zero until a state dict is loaded."""
        return GraphModule(self)

    def row(self, tensors: Mapping[str, Float32]) -> Float32:
        """Tensors -> flat row: one after another, each from a cache line's start."""
        check_tensors(self.parameters, tensors)
        row = np.zeros(self.row_floats, np.float32)
        for name, part in self._layout.arrays(row).items():
            part[...] = tensors[name]
        check_finite(row, tensors)
        return row

    def decide(self, row: Float32) -> None:
        """Try on this model's row, unless it is known already, whether rows may run together.

        Raises:
            ArchiveInvalid: not even one model can be run.
        """
        with _deciding:
            if self.one_by_one is None:
                self.one_by_one = self._why_not_batched(row)

    def bind(self, block: torch.Tensor) -> Sequence[torch.Tensor]:
        """Rows [B, row_floats] -> the parameters [B, *shape] in order, then what never changes."""
        return [*self._layout.views(block).values(), *self.program.constants(block.device)]

    def forward(self, weights: Sequence[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        """Input x [B, *input_shape] -> [B, *output_shape]; see Family.forward."""
        if len(x) == 1 or self.one_by_one != "":
            return self._alone(weights, x)
        return self._together(weights, x)

    def _alone(self, weights: Sequence[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        """One row after another."""
        parameters, constants = weights[: len(self.parameters)], weights[len(self.parameters) :]
        answers = [
            self.program.run(x[b : b + 1], [*(each[b] for each in parameters), *constants]) for b in range(len(x))
        ]
        return torch.cat(answers)

    def _together(self, weights: Sequence[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        """All rows under `vmap`, some at once."""
        parameters, constants = weights[: len(self.parameters)], weights[len(self.parameters) :]

        def one(x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
            return self.program.run(x, [*parameters, *constants], for_vmap=True)[0]

        at_once = self._at_once(x.device)
        rows = [slice(at, at + at_once) for at in range(0, len(x), at_once)]
        return torch.cat([vmap(one)(x[some, None], *(each[some] for each in parameters)) for some in rows])

    def _at_once(self, device: torch.device) -> int:
        """Rows of one `vmap`."""
        limit = CPU_BATCH_ELEMENTS if device.type == "cpu" else MAX_BATCH_ELEMENTS
        return max(MIN_TOGETHER, limit // max(1, self.program.elements))

    def _why_not_batched(self, row: Float32) -> str:
        """Rows of as many models together, and each alone."""
        numbers = np.random.default_rng(0)
        for rows in TRIED_ROWS:
            block = torch.from_numpy(_perturb_rows(row, rows, numbers))
            x = torch.from_numpy(numbers.standard_normal((rows, *self.input_shape), np.float32))
            if reason := self._difference(block, x):
                return reason
        return ""

    def _difference(self, block: torch.Tensor, x: torch.Tensor) -> str:
        """Why these rows do not answer together as they do alone; empty where they do."""
        with torch.inference_mode():
            weights = self.bind(block)
            try:
                alone = self._alone(weights, x)
            except Exception as error:
                raise ArchiveInvalid(f"{GRAPH_FILE}: the graph cannot be run: {_first_line(error)}") from error
            try:
                with _without_fallback():
                    together = self._together(weights, x)
            except Exception as error:
                return _first_line(error)
        if torch.allclose(together, alone, atol=ABSOLUTE, rtol=RELATIVE, equal_nan=True):
            return ""
        return f"batched answers differ by up to {(together - alone).abs().max():.2g} from those of one model"


class GraphModule(nn.Module):
    """x [N, *input_shape] -> [N, *output_shape], each row of x run alone; parameters by the archive's names."""

    def __init__(self, family: GraphFamily) -> None:
        super().__init__()
        self._family = family
        for name, shape in family.parameters.items():
            *path, leaf = name.split(".")
            owner: nn.Module = self
            for part in path:
                if part not in owner._modules:  # noqa: SLF001 -- as torch's own loaders do it
                    owner.add_module(part, nn.Module())
                owner = owner.get_submodule(part)
            owner.register_parameter(leaf, nn.Parameter(torch.zeros(shape)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Every row by the plain operators."""
        program, state = self._family.program, dict(self.named_parameters())
        fixed = [*(state[name] for name in program.parameters), *program.constants(x.device)]
        return torch.cat([program.run(row[None], fixed) for row in x])


_families: "WeakValueDictionary[bytes, GraphFamily]" = WeakValueDictionary()


def graph_family(raw: bytes) -> GraphFamily:
    """The family of a `graph.json`: the same object for the same bytes, for as long as it is in use.

    A graph has up to 4 MiB: those that no model has any more must not stay in memory. Raises ArchiveInvalid that names
    the place.
    """
    key = sha256(raw).digest()
    family = _families.get(key)
    if family is None:  # of two threads that get here at once, both get the first one's
        family = _families.setdefault(key, GraphFamily(parse_graph(raw)))
    return family


@contextmanager
def _without_fallback() -> Iterator[None]:
    """`vmap` refuses an operator it has no rule for, instead of looping over the rows inside of it."""
    functorch: Any = torch._C._functorch  # noqa: SLF001 -- the switch has no public name
    before = functorch._is_vmap_fallback_enabled()  # noqa: SLF001
    functorch._set_vmap_fallback_enabled(False)  # noqa: SLF001
    try:
        yield
    finally:
        functorch._set_vmap_fallback_enabled(before)  # noqa: SLF001


def _perturb_rows(row: Float32, count: int, numbers: np.random.Generator) -> Float32:
    """The row, and others near it: no two alike, wherever it is zero too, and variances stay positive."""
    block = np.repeat(row[None], count, axis=0)
    others = block[1:]
    others *= 0.9 + 0.2 * numbers.random(others.shape, np.float32)
    others += 0.01 * numbers.random(others.shape, np.float32)
    return block


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

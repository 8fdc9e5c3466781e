"""Graphs: modules go out as operators and come back as families that answer alike; what is hostile is refused."""

import inspect
import json
import threading
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from torch import nn

from handlers.base import Float32
from handlers.kinds.graph import GraphFamily, graph_family
from handlers.kinds.graph.export import export_graph
from handlers.kinds.graph.family import CPU_BATCH_ELEMENTS, MAX_BATCH_ELEMENTS, MIN_TOGETHER
from handlers.kinds.graph.operators import ALLOWED, find_operator
from handlers.kinds.graph.schema import encode_graph, parse_graph
from model_store.errors import ArchiveInvalid
from tests.handlers.nets import BATCHED, SHAPE, Dilated, RecurrentNet, make_module


@cache  # half a second of torch each
def exported_once(build: Callable[[], nn.Module]) -> tuple[bytes, dict[str, Float32]]:
    """What `export_graph` gives for the network's first model."""
    module = make_module(build, 0)
    return export_graph(module, {next(iter(inspect.signature(module.forward).parameters)): SHAPE})


def export_models(
    build: Callable[[], nn.Module], models: int = 3
) -> tuple[GraphFamily, list[nn.Module], list[Float32]]:
    """The family of a network, several models of it, and their rows."""
    modules = [make_module(build, seed) for seed in range(models)]
    raw, tensors = exported_once(build)
    family = graph_family(raw)
    states = [tensors | {name: tensor.numpy() for name, tensor in module.state_dict().items()} for module in modules]
    rows = [family.row({name: state[name] for name in family.parameters}) for state in states]
    family.decide(rows[0])  # as a load does; what `export_graph` found is forgotten with its family
    return family, modules, rows


def assert_answers_as_modules(family: GraphFamily, modules: list[nn.Module], rows: list[Float32], batch: int) -> None:
    """Rows of the models in any order, under one binding, answer as each module does; nothing is written into."""
    numbers = np.random.default_rng(batch)
    which = torch.from_numpy(numbers.integers(0, len(modules), batch))
    x = torch.from_numpy(numbers.standard_normal((batch, *SHAPE), np.float32))
    block = torch.empty(batch, family.row_floats)
    with torch.inference_mode():
        bound = family.bind(block)
    torch.index_select(
        torch.from_numpy(np.stack(rows)), 0, which, out=block
    )  # gathered after binding, as a server does
    before, x_before = block.clone(), x.clone()
    with torch.inference_mode():
        answer = family.forward(bound, x)
    expected = torch.empty(batch, *family.output_shape)
    with torch.no_grad():
        for model, module in enumerate(modules):
            if (which == model).any():
                expected[which == model] = module(x[which == model])
    torch.testing.assert_close(answer, expected, atol=1e-5, rtol=1e-4)
    assert torch.equal(block, before)
    assert torch.equal(x, x_before)


@pytest.mark.parametrize("name", BATCHED)
def test_models_are_the_same_however_often_they_are_made(name: str) -> None:
    """Networks of the tests share no layer, and their numbers come from the seed: no test changes another's."""
    first = [make_module(BATCHED[name], seed).state_dict() for seed in (0, 1)]
    again = [make_module(BATCHED[name], seed).state_dict() for seed in (0, 1)]
    for before, after in zip(first, again, strict=True):
        assert all(torch.equal(before[key], after[key]) for key in before)
    learnt = [key for key in first[0] if first[0][key].is_floating_point()]
    assert not any(torch.equal(first[0][key], first[1][key]) for key in learnt)


# --- what batches -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", BATCHED)
def test_a_batch_of_models_answers_as_each_alone(name: str) -> None:
    """Linear, convolution, norms, attention, pooling, padding: run together, from one request to a tick of 512."""
    family, modules, rows = export_models(BATCHED[name])
    assert family.one_by_one == ""
    for batch in (1, 2, 33, 512):
        assert_answers_as_modules(family, modules, rows, batch)


@pytest.mark.slow
def test_what_cannot_batch_runs_one_by_one_and_says_why() -> None:
    """`vmap` has no rule for a fused recurrence: the reason names the operator, the answers are right all the same."""
    family, modules, rows = export_models(RecurrentNet)
    assert "aten::gru" in str(family.one_by_one)
    assert family.runs.startswith("one by one: ")
    for batch in (1, 9):
        assert_answers_as_modules(family, modules, rows, batch)


def test_answers_that_differ_are_not_batched(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batching rule that is wrong is found by the probe, and then not used."""
    family, modules, rows = export_models(BATCHED["linear"])
    fresh = GraphFamily(family.graph)
    monkeypatch.setattr(fresh, "_together", lambda weights, x: fresh._alone(weights, x) * 1.001)
    fresh.decide(rows[0])
    assert str(fresh.one_by_one).startswith("batched answers differ by up to ")
    assert_answers_as_modules(fresh, modules, rows, 4)


@pytest.mark.slow
@pytest.mark.parametrize("moved", [[1, 0], [1, 2, 3, 4, 0], [4, 3, 2, 1, 0]])
@pytest.mark.parametrize("first", ["usual", "zeros"])
def test_answers_under_another_model_are_found(first: str, moved: list[int]) -> None:
    """A batching rule that gives rows the numbers of others shows, whatever the first archive's numbers are."""
    family, _, rows = export_models(BATCHED["linear"])

    class Moved(GraphFamily):
        """Its rules move models about, in batches of one size."""

        def _together(self, weights: Sequence[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
            if len(x) != len(moved):
                return super()._together(weights, x)
            return super()._together([each[moved] for each in weights], x)

    fresh = Moved(family.graph)
    fresh.decide(rows[0] * (first == "usual"))
    assert str(fresh.one_by_one).startswith("batched answers differ by up to ")


def test_nothing_runs_together_before_it_is_proved() -> None:
    """A family that was not tried answers one by one."""
    family, modules, rows = export_models(BATCHED["linear"])
    fresh = GraphFamily(family.graph)
    assert (fresh.one_by_one, fresh.runs) == (None, "not tried yet")
    assert_answers_as_modules(fresh, modules, rows, 3)


def test_a_large_batch_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many rows as the memory for intermediate results allows, and the rest after them."""
    family, modules, rows = export_models(BATCHED["linear"])
    monkeypatch.setattr(family, "_at_once", lambda _: 3)
    assert_answers_as_modules(family, modules, rows, 17)
    assert not family._why_not_batched(rows[0])


def test_rows_at_once_follow_the_device_and_the_network() -> None:
    """Few where results would leave a CPU's cache, more on a GPU, and some of even the largest network."""
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    family, _, _ = export_models(Dilated, models=1)
    assert family._at_once(gpu) > 8 * family._at_once(cpu)
    assert 512 < family._at_once(cpu) <= CPU_BATCH_ELEMENTS // family.program.elements
    large = graph_family(make_graph(("aten.expand.default", [take_named("w"), [1, 1 << 24]]), w=[1]))
    assert large._at_once(cpu) == MIN_TOGETHER
    assert large._at_once(gpu) * large.program.elements <= MAX_BATCH_ELEMENTS


def test_the_switch_of_vmap_is_left_as_it_was() -> None:
    """Trying a family changes nothing for others in the process."""
    export_models(RecurrentNet, models=1)
    assert torch._C._functorch._is_vmap_fallback_enabled()  # type: ignore[attr-defined]


def test_threads_may_load_one_family_at_once() -> None:
    """As loader threads do: one decision, right answers."""
    family, modules, rows = export_models(Dilated)
    fresh = GraphFamily(family.graph)
    threads = [threading.Thread(target=fresh.decide, args=(row,)) for row in rows * 3]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert_answers_as_modules(fresh, modules, rows, 8)
    assert fresh.one_by_one == ""


# --- families ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_models_of_one_class_are_one_family() -> None:
    """The numbers do not matter, the configuration does; nor does how the file is written."""
    first, _ = exported_once(Dilated)
    again, _ = export_graph(make_module(Dilated, 2), {"x": SHAPE})
    other, _ = export_graph(make_module(lambda: Dilated(9), 1), {"x": SHAPE})
    assert first == again
    family = graph_family(first)
    assert family is graph_family(again)
    assert family.key.startswith("graph-")
    assert family.key != graph_family(other).key
    spaced = msgspec.json.format(first, indent=2)
    turned = json.loads(first)
    turned["parameters"] = dict(reversed(turned["parameters"].items()))
    for same in (spaced, json.dumps(turned).encode()):
        assert (graph_family(same).key, list(graph_family(same).parameters)) == (family.key, list(family.parameters))


def test_a_graph_is_a_module_again() -> None:
    """The reference takes the archive's numbers by name and answers as the module they came from."""
    module, (raw, tensors) = make_module(BATCHED["image"], 0), exported_once(BATCHED["image"])
    reference = graph_family(raw).reference()
    reference.load_state_dict({name: torch.from_numpy(tensor) for name, tensor in tensors.items()})
    x = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(reference(x), module(x), atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_wrong_tensors_are_refused_by_name() -> None:
    """Another configuration's numbers never become a row, nor do numbers that are none."""
    raw, tensors = exported_once(Dilated)
    family = graph_family(raw)
    with pytest.raises(ArchiveInvalid, match=r"'head.bias' must be float32 \[12\], not float32 \[11\]"):
        family.row(tensors | {"head.bias": tensors["head.bias"][:-1]})
    with pytest.raises(ArchiveInvalid, match=r"not finite: head\.bias"):
        family.row(tensors | {"head.bias": tensors["head.bias"] * np.float32(np.nan)})


# --- export -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_export_leaves_the_module_as_it_was() -> None:
    """A module in training stays in training, with its gradients on and its numbers unchanged."""
    module = make_module(BATCHED["batch-norm"], 0).train()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    export_graph(module, {"input": SHAPE})
    assert module.training
    assert all(parameter.requires_grad for parameter in module.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


@pytest.mark.slow
def test_constants_travel_with_the_archive() -> None:
    """Buffers that are not saved: numbers go with the weights, truth values into the graph. What the answer does not
    need is left out.
    """
    raw, tensors = exported_once(BATCHED["encoder-norm-first"])
    assert tensors["fading"].shape == (12, 1)
    assert parse_graph(raw).constants["seen"].dtype == "bool"
    _, normed = exported_once(BATCHED["batch-norm"])
    assert not any("num_batches_tracked" in name for name in normed)
    assert not any(node.op.startswith("aten.dropout") for node in parse_graph(raw).nodes)


class Odd(nn.Module):
    """A forward that graphs cannot hold, by name."""

    calls: torch.Tensor

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what
        self.weight = nn.Parameter(torch.ones(3, dtype=torch.float64 if what == "double" else torch.float32))
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> Any:
        """Input x [N, 3, 12] -> what should not be."""
        if self.what == "branch":
            return x if x.sum() > 0 else -x
        if self.what == "random":
            return x + torch.rand_like(x)
        if self.what == "nonzero":
            return x[x > 0]
        if self.what == "several":
            return x, x + 1
        if self.what == "state":
            self.calls += 1
            return x + self.calls
        if self.what == "lookup":
            return x[:, x[0, 0, :2].long().clamp(0, 2)]
        if self.what == "no-batch":
            return x.flatten()
        return (x * self.weight[:, None]).double()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("branch", "torch.export cannot export Odd"),
        ("random", r"operator 'aten\.rand"),
        ("nonzero", "it looks up by numbers that depend on the request"),
        ("several", "forward returns 2 values"),
        ("state", r"forward writes into \['calls'\]"),
        ("lookup", r"aten\.index\.Tensor\): it looks up by numbers that depend on the request"),
        ("no-batch", r"must be one float32 tensor \[1, ...\]"),
        ("double", r"weight is torch\.float64 \[3\]; convert the module with \.float\(\)"),
        ("answer", r"must be one float32 tensor"),
    ],
)
def test_what_a_graph_cannot_hold_is_not_packed(what: str, said: str) -> None:
    """The error says what is in the way."""
    with pytest.raises(ArchiveInvalid, match=said):
        export_graph(Odd(what), {"x": SHAPE})


def test_inputs_are_checked() -> None:
    """One tensor, by the name that forward gives it."""
    with pytest.raises(ArchiveInvalid, match=r"one tensor, not \['a', 'b'\]"):
        export_graph(Dilated(), {"a": SHAPE, "b": SHAPE})
    with pytest.raises(ArchiveInvalid, match=r"torch\.export cannot export Dilated"):
        export_graph(Dilated(), {"y": SHAPE})


# --- hostile graphs ---------------------------------------------------------------------------------------------------

X = {"kind": "tensor", "name": "x"}
FLOAT64 = {"dtype": {"kind": "dtype", "name": "float64"}}


def take_node(place: int) -> dict[str, str]:
    """The result of the node at that place."""
    return {"kind": "tensor", "name": f"n{place}"}


def take_named(name: str) -> dict[str, str]:
    """A parameter or constant."""
    return {"kind": "tensor", "name": name}


def make_graph(*nodes: tuple[Any, ...], constants: Any = None, **parameters: list[int]) -> bytes:
    """A `graph.json` of x [4, 8] whose last node is the answer."""
    listed = [
        {"name": f"n{i}", "op": op, "args": args, "kwargs": kwargs[0] if kwargs else {}}
        for i, (op, args, *kwargs) in enumerate(nodes)
    ]
    made = {"input": {"name": "x", "shape": [4, 8]}, "parameters": parameters, "constants": constants or {}}
    return json.dumps({**made, "nodes": listed, "output": f"n{len(nodes) - 1}"}).encode()


def make_ones(*shape: int) -> tuple[str, list[Any]]:
    """A node that makes a tensor of nothing."""
    return "aten.full.default", [list(shape), 1.0]


DOUBLED = [("aten.cat.default", [[take_node(i), take_node(i)], 0]) for i in range(40)]
NORM = "aten._native_batch_norm_legit_no_training.default"
GRU = [
    ("aten.gru.input", [X, take_named("h"), [take_named("w")] * 2, False, 1, 0.0, False, False, True]),
    ("getitem", [take_node(0), 0]),
]
MANY = [("aten.gru.input", [X, take_named("h"), [take_named("w")] * 2, False, 2**20, 0.0, False, False, True])]
INDEX = {"i": {"dtype": "int64", "shape": [1], "data": [99]}}
RELU = "aten.relu.default"
LEAST = {"a": {"dtype": "int64", "shape": [1], "data": [-(2**63)]}, "b": {"dtype": "int64", "shape": [], "data": [-1]}}
TRUNC = {"rounding_mode": "trunc"}
HOSTILE: dict[str, tuple[bytes, str]] = {
    "not JSON": (b"\xff", "graph.json: "),
    "nested": (b"[" * 100_000, "graph.json: "),
    "another operator": (make_graph(("os.system", ["ls"])), "'os.system' is not one a graph may hold"),
    "beyond its memory": (
        make_graph(("aten.as_strided.default", [X, [9], [1]])),
        "aten.as_strided.default' is not one",
    ),
    "in place": (make_graph(("aten.add_.Tensor", [X, 1])), "node 'n0'.*is not one"),
    "random": (make_graph(("aten.rand_like.default", [X])), "is not one"),
    "dropout": (
        make_graph(("aten.scaled_dot_product_attention.default", [X, X, X, None, 0.5])),
        "dropout_p 0.5, but a served model is in evaluation mode",
    ),
    "a device": (make_graph(("aten.full_like.default", [X, 1.0], {"device": "cuda"})), "may not say device"),
    "dangling": (make_graph((RELU, [take_named("y")])), "refers to 'y', which nothing before it gives"),
    "a cycle": (
        make_graph((RELU, [take_node(1)]), (RELU, [take_node(0)])),
        "refers to 'n1', which nothing before it gives",
    ),
    "a name twice": (make_graph((RELU, [X])).replace(b'"n0"', b'"x"'), "'x' is given twice"),
    "arity": (make_graph((RELU, [X, X])), "expected at most 1 argument"),
    "a type": (make_graph((RELU, ["x"])), "Expected a value of type 'Tensor'"),
    "a number for a dtype": (make_graph(("aten.softmax.int", [X, -1, -1])), "not a named dtype"),
    "a dtype": (
        make_graph(("aten._to_copy.default", [X], {"dtype": take_named("x") | {"kind": "dtype"}})),
        "unknown dtype 'x'",
    ),
    "huge": (make_graph(make_ones(2**40)), "one request takes 1099511627776 numbers"),
    "huger": (make_graph(make_ones(2**62, 2**62)), "cannot run: Storage size"),
    "a long range": (make_graph(("aten.arange.default", [10**15])), "numbers in its results"),
    "expanded": (make_graph(("aten.expand.default", [X, [2**33, 4, 8]])), "numbers in its results"),
    "doubled": (make_graph((RELU, [X]), *DOUBLED), "node 'n2.'.*numbers in its results"),
    "arithmetic": (
        make_graph(make_ones(4096, 4096), ("aten.mm.default", [take_node(0), take_node(0)])),
        "floating-point operations",
    ),
    "pieces": (
        make_graph(make_ones(10**7), ("aten.split.Tensor", [take_node(0), 1])),
        "10000000 tensors, more than 4096",
    ),
    "no pieces": (make_graph(("aten.split.Tensor", [X, 0])), "cannot run"),
    "kept": (
        make_graph(make_ones(1, 2**21), ("aten.add.Tensor", [take_node(0), take_named("w")]), w=[1]),
        "2097152 numbers would be kept",
    ),
    "a parameter": (make_graph((RELU, [X]), w=[2**31, 2**31]), "'w' of shape"),
    "several": (make_graph(("aten.split.Tensor", [X, 2, 1]), (RELU, [take_node(0)])), "pick one with getitem"),
    "no such piece": (make_graph(("aten.split.Tensor", [X, 2, 1]), ("getitem", [take_node(0), 7])), "out of range"),
    "of a tensor": (make_graph(("getitem", [X, 0])), "not a part of a tensor"),
    "the answer": (make_graph(("aten._to_copy.default", [X], FLOAT64)), "must be one float32 tensor"),
    "no batch axis": (make_graph(("aten.view.default", [X, [2, 16]])), "must be one float32 tensor"),
    "a lookup": (
        make_graph(("aten.gt.Scalar", [X, 0.0]), ("aten.index.Tensor", [X, [take_node(0)]])),
        "depend on the request",
    ),
    "a lookup outside": (
        make_graph(("aten.index.Tensor", [X, [None, take_named("i")]]), constants=INDEX),
        "index 99 is out of bounds",
    ),
    "a norm's numbers": (
        make_graph((NORM, [X, None, None, take_named("m"), take_named("m"), 0.1, 1e-5]), m=[2]),
        "should contain 4 elements",
    ),
    "stride 0": (make_graph(("aten.conv1d.default", [X, take_named("w"), None, [0]]), w=[2, 4, 3]), "cannot run"),
    "padding": (
        make_graph(("aten.conv1d.default", [X, take_named("w"), None, [1], [-1]]), w=[2, 4, 3]),
        "negative padding",
    ),
    "no window": (make_graph(("aten.max_pool1d.default", [X, [0]])), "greater than zero"),
    "a quotient": (
        make_graph(("aten.div.Tensor_mode", [take_named("a"), take_named("b")], TRUNC), constants=LEAST),
        "whole numbers by a tensor",
    ),
    "a quotient's number": (
        make_graph(("aten.floor_divide.default", [take_named("a"), -1]), constants=LEAST),
        "or by -1",
    ),
    "a remainder": (make_graph(("aten.fmod.Scalar", [take_named("a")], {"other": -1}), constants=LEAST), "cannot run"),
    "rolled models": (
        make_graph(("aten.roll.default", [take_named("w"), [12]]), ("aten.add.Tensor", [X, take_node(0)]), w=[]),
        "of no axes",
    ),
    "a factor": (make_graph(("aten.pixel_shuffle.default", [X, 2**32])), "factor 4294967296 is too large"),
    "a recurrence's numbers": (make_graph(*GRU, w=[4, 4], h=[1, 1, 4]), r"need \[\(12, 8\), \(12, 4\)\]"),
    "a recurrence's state": (make_graph(*GRU, w=[12, 8], h=[1, 4]), "do not fit the input"),
    "a recurrence's length": (make_graph(*MANY, w=[12, 8], h=[2**20, 1, 4]), "not those of 1048576 layers"),
    "a constant's shape": (make_graph((RELU, [X]), constants={"i": INDEX["i"] | {"shape": [2]}}), "needs 2 items"),
}


def load_graph(raw: bytes) -> None:
    """What a loader does with a graph and numbers of the right shapes."""
    family = graph_family(raw)
    family.decide(family.row({key: np.ones(shape, np.float32) for key, shape in family.parameters.items()}))


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_graph_is_refused(name: str) -> None:
    """Each with its own ArchiveInvalid that names the file, and the node where there is one; nothing else is raised."""
    raw, said = HOSTILE[name]
    with pytest.raises(ArchiveInvalid, match=said) as caught:
        load_graph(raw)
    assert str(caught.value).startswith("graph.json: ")


def test_what_is_taken_has_no_side_effects() -> None:
    """Torch's own word for every operator: none writes into an argument, and this torch has each of them."""
    for op in ALLOWED:
        find_operator(op)
        _, packet, overload = op.split(".")
        found = getattr(getattr(torch.ops.aten, packet), overload)
        assert not found._schema.is_mutable, op
        assert torch.Tag.inplace_view not in found.tags, op


def test_records_survive_the_file() -> None:
    """What is written is what is read, infinities and dtypes too."""
    raw, _ = exported_once(BATCHED["encoder"])
    assert encode_graph(parse_graph(raw)) == raw
    infinite = make_graph(("aten.clamp.default", [X, {"kind": "number", "name": "-inf"}, 0.5]))
    x = torch.tensor([[[-1e30] * 4 + [1.0] * 4] * 4])
    answer = graph_family(infinite).program.run(x, [])
    assert answer[0, 0].tolist() == x[0, 0].clamp(max=0.5).tolist()


# --- short weights ----------------------------------------------------------------------------------------------------


class Drawing(nn.Module):
    """A head over x, and noise that follows from a whole number in the last channel: paths of a seed."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(12, 4)
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Input x [N, 3, 12], the seed at [:, 2, 0] -> [N, 4]."""
        noise = torch.sin((x[:, 2, :1] * torch.arange(1, 5)) % 997)
        answer: torch.Tensor = self.head(x[:, 0]) + self.scale * noise
        return answer


@pytest.mark.slow
@pytest.mark.parametrize("name", [*BATCHED, "recurrent"])
@pytest.mark.parametrize("batch", [1, 5])
def test_weights_in_bfloat16_answer_closely(name: str, batch: int) -> None:
    """Inputs stay float32, as families promise: every layer gets what it multiplies in one precision."""
    family, _, rows = export_models(BATCHED.get(name, RecurrentNet))
    x = torch.from_numpy(np.random.default_rng(batch).standard_normal((batch, *SHAPE), np.float32))
    block = torch.from_numpy(np.stack([rows[i % len(rows)] for i in range(batch)]))
    with torch.inference_mode():
        right = family.forward(family.bind(block), x)
        found = family.forward(family.bind(block.to(torch.bfloat16)), x).float()
    torch.testing.assert_close(found, right, atol=0.06 * float(right.abs().max()), rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 2])
def test_whole_numbers_of_an_input_survive_short_weights(batch: int) -> None:
    """Two seeds that bfloat16 cannot tell apart draw two sets of paths, those of float32."""
    family, _, rows = export_models(Drawing, 1)
    assert family.one_by_one == ""
    x = torch.zeros(2, *SHAPE)
    x[:, 2, 0] = torch.tensor([1_000_001.0, 1_000_999.0])
    assert x.to(torch.bfloat16)[0].equal(x.to(torch.bfloat16)[1])
    block = torch.from_numpy(np.stack([rows[0]] * 2))
    with torch.inference_mode():
        right = family.forward(family.bind(block), x)
        short = block.to(torch.bfloat16)
        parts = [family.forward(family.bind(short[at : at + batch]), x[at : at + batch]) for at in range(0, 2, batch)]
    found = torch.cat(parts).float()
    torch.testing.assert_close(found, right, atol=0.02, rtol=0.02)
    assert (found[0] - found[1]).abs().max() > 0.3

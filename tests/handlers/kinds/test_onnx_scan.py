"""The look for external data takes a bounded number of steps, and finds it wherever it is."""

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from handlers.kinds.onnx import scan as kind
from handlers.kinds.onnx.scan import MAX_FIELDS, MAX_PARTS, SCALARS_AT_ONCE, check_model
from model_store.errors import ArchiveInvalid, ArchiveTooLarge

SCALAR = b"\x08\x01"  #: ir_version of a model, 1
UNKNOWN = b"\x80\x01\x01"  #: field 16 of a model, which has none, 1


@pytest.mark.slow
def test_fields_at_the_bound() -> None:
    """So many are looked at, and not one more."""
    check_model(UNKNOWN * MAX_FIELDS)
    with pytest.raises(ArchiveTooLarge, match="fields of an ONNX model"):
        check_model(UNKNOWN * (MAX_FIELDS + 1))


@pytest.mark.slow
def test_fields_count_over_all_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of messages within messages are fields too: here each node's, and each name in one."""
    allowed = 20_000
    monkeypatch.setattr(kind, "MAX_FIELDS", allowed)
    node = b"\x0a\x00" * 5  # five inputs
    graph = (b"\x0a%c" % len(node) + node) * (allowed // 6)
    check_model(onnx.ModelProto(graph=onnx.GraphProto.FromString(graph)).SerializeToString())
    more = graph + (b"\x0a%c" % len(node) + node)
    with pytest.raises(ArchiveTooLarge, match="fields of an ONNX model"):
        check_model(onnx.ModelProto(graph=onnx.GraphProto.FromString(more)).SerializeToString())


def test_single_numbers_at_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are skipped fast, and are bounded by their bytes: more of them than fields are allowed."""
    allowed = 4 * MAX_FIELDS
    monkeypatch.setattr(kind, "MAX_SCALAR_BYTES", allowed)
    check_model(SCALAR * (allowed // 2))
    with pytest.raises(ArchiveTooLarge, match="single numbers"):
        check_model(SCALAR * (allowed // 2 + 1))


@pytest.mark.slow
def test_a_large_tree_ensemble_is_scanned() -> None:
    """100,000 nodes have 800,000 unpacked numbers and as many names as nodes: a sound model."""
    count = 100_000
    numbers = {f"numbers_{i}": list(range(count)) for i in range(6)} | {"values": [0.5] * count, "more": [1.5] * count}
    node = helper.make_node("TreeEnsembleRegressor", ["x"], ["y"])
    texts = {"nodes_modes": ["BRANCH_LEQ"] * count}
    node.attribute.extend(helper.make_attribute(name, value) for name, value in {**numbers, **texts}.items())
    graph = helper.make_graph([node], "g", [], [])
    check_model(helper.make_model(graph).SerializeToString())


NUMBERS = st.lists(
    st.one_of(st.integers(-(2**63), 2**63 - 1).map(lambda n: ("i", n)), st.floats(width=32).map(lambda x: ("f", x))),
    max_size=20,
)


@pytest.mark.slow
@given(numbers=NUMBERS, padding=st.integers(0, 3), external=st.booleans())
def test_skipping_loses_nothing(numbers: list[tuple[str, float]], padding: int, *, external: bool) -> None:
    """Whatever numbers stand before it, and wherever a piece that is skipped ends, an external tensor is found."""
    attributes = []
    for name, value in numbers:
        attribute = onnx.AttributeProto(name="a" * padding, type=onnx.AttributeProto.INT)
        setattr(attribute, name, value)
        attribute.ints.extend([2**62] * (SCALARS_AT_ONCE // 40))
        attributes.append(attribute)
    tensor = TensorProto(name="t", dims=[1], data_type=TensorProto.FLOAT)
    if external:
        tensor.data_location = TensorProto.EXTERNAL
    else:
        tensor.raw_data = np.zeros(1, np.float32).tobytes()
    holder = onnx.AttributeProto(name="v", type=onnx.AttributeProto.TENSOR, t=tensor)
    holder.ints.extend([1] * padding)
    graph = onnx.GraphProto(node=[onnx.NodeProto(op_type="Constant", attribute=[*attributes, holder])])
    model = onnx.ModelProto(ir_version=8, graph=graph).SerializeToString()
    if external:
        with pytest.raises(ArchiveInvalid, match="external file"):
            check_model(model)
    else:
        check_model(model)


def with_functions(bodies: dict[str, list[str]], main: list[str]) -> bytes:
    """A model of functions of the domain `ours` that call each other by name; other names are operators."""

    def make_nodes(called: list[str]) -> list[onnx.NodeProto]:
        return [
            helper.make_node(name, [f"v{i}"], [f"v{i + 1}"], domain="ours" if name in bodies else "")
            for i, name in enumerate(called)
        ]

    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ours", 1)]
    functions = [
        helper.make_function("ours", name, ["v0"], [f"v{len(called)}"], make_nodes(called), opsets)
        for name, called in bodies.items()
    ]
    x, y = (helper.make_tensor_value_info(v, TensorProto.FLOAT, ["n", 1]) for v in ("v0", f"v{len(main)}"))
    graph = helper.make_graph(make_nodes(main), "g", [x], [y])
    model = helper.make_model(graph, functions=functions, opset_imports=opsets, ir_version=8)
    packed: bytes = model.SerializeToString()
    return packed


def test_functions_are_counted_in_the_place_of_their_calls() -> None:
    """Fourteen that double come to the bound; thirty would be a billion nodes, and are refused at once."""
    doubling = {f"f{i}": [f"f{i - 1}"] * 2 if i else ["Relu"] for i in range(31)}
    assert MAX_PARTS < 2**14
    check_model(with_functions({name: doubling[name] for name in list(doubling)[:14]}, ["f13", "Relu"]))
    with pytest.raises(ArchiveInvalid, match="it has 1073741825 nodes, 16000 are allowed"):
        check_model(with_functions(doubling, ["f30", "Relu"]))


def test_functions_that_call_themselves_are_refused() -> None:
    """Directly or by way of others; an operator of the standard domain may have a function's name."""
    for bodies in ({"f": ["Relu", "f"]}, {"f": ["g"], "g": ["h"], "h": ["f"]}):
        with pytest.raises(ArchiveInvalid, match="calls itself"):
            check_model(with_functions(bodies, ["f"]))
    named = onnx.ModelProto.FromString(with_functions({"Relu": ["x"]}, ["Relu"]))
    named.functions[0].node[0].CopyFrom(helper.make_node("Relu", ["v0"], ["v1"]))
    check_model(named.SerializeToString())

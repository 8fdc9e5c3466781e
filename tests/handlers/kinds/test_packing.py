"""Packing by kind: what is packed comes back, and nothing is packed that a server would refuse."""

import numpy as np
import pytest
from hypothesis import strategies as st

from handlers.kinds import ArchiveParts, find_kind, pack_model
from model_store.archives.archive import open_archive, read_tensors
from model_store.archives.manifest import CorrelationSpec, Kind, Spec, Weights
from model_store.errors import ArchiveInvalid
from tests.archives import CONFIG, FORECAST, GOLDEN, GRAPH, make_forecaster, make_tensors

ONNX = Spec(kind=Kind.ONNX, weights=Weights(file="model.onnx"))
NAMES = st.from_regex(r"[a-z]{1,8}(/[a-z]{1,8})?", fullmatch=True)


def test_a_forecaster_comes_back_as_packed() -> None:
    """Architecture, configuration, forecast metadata, golden sample and numbers survive."""
    archive = open_archive(make_forecaster(5), "m")
    assert find_kind(archive).kind is Kind.FORECASTER
    assert archive.spec is not None
    assert (archive.spec.architecture, archive.spec.config, archive.spec.forecast) == ("sketch", CONFIG, FORECAST)
    assert archive.golden() == GOLDEN
    tensors = read_tensors(archive)
    assert tensors.keys() == make_tensors(5).keys()
    for name, tensor in make_tensors(5).items():
        np.testing.assert_array_equal(tensors[name], tensor)


def test_an_onnx_model_comes_back_as_packed() -> None:
    """The bytes are carried as they are."""
    archive = open_archive(
        pack_model(Kind.ONNX, ArchiveParts(program=b"\x08\x07graph"), model_name="m", golden=GOLDEN), "m"
    )
    assert (find_kind(archive).kind, archive.weights(), archive.golden()) == (Kind.ONNX, b"\x08\x07graph", GOLDEN)


def test_a_graph_comes_back_as_packed() -> None:
    """Operators, numbers, forecast metadata and golden sample survive; numbers that are none are refused."""
    packed = pack_model(
        Kind.GRAPH,
        ArchiveParts(program=GRAPH, tensors=make_tensors(3), forecast=FORECAST),
        model_name="m",
        golden=GOLDEN,
    )
    archive = open_archive(packed, "m")
    assert archive.spec is not None
    assert (find_kind(archive).kind, archive.read_record("graph.json"), archive.spec.forecast) == (
        Kind.GRAPH,
        GRAPH,
        FORECAST,
    )
    assert archive.golden() == GOLDEN
    for name, tensor in make_tensors(3).items():
        np.testing.assert_array_equal(read_tensors(archive)[name], tensor)
    with pytest.raises(ArchiveInvalid, match="'w' has 1 values that are NaN"):
        pack_model(
            Kind.GRAPH, ArchiveParts(program=GRAPH, tensors={"w": np.array([np.nan], np.float32)}), model_name="m"
        )


def test_a_correlation_comes_back_as_packed() -> None:
    """Record and factors survive, equal input gives equal bytes; tensors that do not fit the record are refused."""
    record = CorrelationSpec(products=("a.mar", "b.mar"), horizon=3, method="gaussian", windows=9)
    factors = {"product_factor": np.eye(2, dtype=np.float32), "time_factor": np.eye(3, dtype=np.float32)}
    packed = pack_model(Kind.CORRELATION, ArchiveParts(correlation=record, tensors=factors), model_name="joint")
    archive = open_archive(packed, "joint.mar")
    assert archive.spec is not None
    assert (find_kind(archive).kind, archive.spec.correlation) == (Kind.CORRELATION, record)
    np.testing.assert_array_equal(read_tensors(archive)["time_factor"], np.eye(3))
    assert (
        pack_model(
            Kind.CORRELATION,
            ArchiveParts(correlation=record, tensors=dict(reversed(factors.items()))),
            model_name="joint",
        )
        == packed
    )
    with pytest.raises(ArchiveInvalid, match=r"'time_factor' is \[2, 2\] instead of \[3, 3\]"):
        pack_model(
            Kind.CORRELATION,
            ArchiveParts(correlation=record, tensors={**factors, "time_factor": np.eye(2, dtype=np.float32)}),
            model_name="joint",
        )

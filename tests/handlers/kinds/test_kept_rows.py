"""What is kept beside a row makes the same model again, for every kind and architecture that runs as rows."""

import json

import msgspec
import numpy as np
import pytest

from handlers.base import Float32
from handlers.forecasters import ARCHITECTURES, build_family, random_tensors
from handlers.kinds import ArchiveParts, RowModel, build_model, pack_model, run_row_on_cpu
from handlers.kinds.kept_rows import KeptArchive, keep_archive, restore_model
from handlers.kinds.models import Target
from model_store.archives.archive import open_archive
from model_store.archives.manifest import Kind
from model_store.errors import LoadError
from tests.archives import GRAPH
from tests.e2e.models import FORECAST_TCN, pack_forecaster

SMALL = {"features": 3, "context_length": 12, "prediction_length": 4, "quantiles": 3}
TARGET = Target()


def pack_small(architecture: str) -> bytes:
    """An archive of tensors of the architecture."""
    fields = ARCHITECTURES[architecture].config.__struct_fields__
    config = {name: size for name, size in SMALL.items() if name in fields}
    family = build_family(architecture, config)
    parts = ArchiveParts(tensors=random_tensors(family, 1), architecture=architecture, config=config)
    return pack_model(Kind.FORECASTER, parts, model_name="m")


def restore(data: bytes) -> tuple[RowModel, RowModel, Float32]:
    """The model that an archive gives, the one that its kept members give, and the row."""
    archive = open_archive(data, "m.mar")
    built = build_model(archive, TARGET)
    assert isinstance(built.body, RowModel)
    assert built.row is not None
    kept = keep_archive(archive, built.body.family)
    assert kept is not None
    packed = msgspec.msgpack.decode(msgspec.msgpack.encode(kept), type=KeptArchive)
    assert len(msgspec.msgpack.encode(kept)) < len(data)
    return built.body, restore_model("m.mar", packed, built.row, TARGET), built.row


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_a_row_of_each_architecture_is_the_same_model_again(architecture: str) -> None:
    """It has the same family and says the same of itself, and its answers are the same bit for bit."""
    first, again, row = restore(pack_small(architecture))
    assert again.family is first.family
    assert again.codec.describe(whole=True) == first.codec.describe(whole=True)
    x = np.random.default_rng(0).standard_normal((2, *first.family.input_shape), np.float32)
    assert np.array_equal(run_row_on_cpu(again.family, row, x), run_row_on_cpu(first.family, row, x))


def test_a_forecaster_answers_a_forecast_again() -> None:
    """Recipe, scaler and levels come from what was kept: the answer to DeepAR JSON has the same bytes."""
    model = pack_forecaster("m.mar", 1, config=FORECAST_TCN, forecast=True)
    first, again, row = restore(model.data)
    body = model.question(1).body
    answers = []
    for each in (first, again):
        call = each.codec.decode(body, "application/json", "application/json")
        answers.append(call.encode(each.run(call, row)))
    assert answers[0] == answers[1]


def test_a_graph_shares_its_operators() -> None:
    """They are kept apart, because all rows of the family have them."""
    data = pack_model(Kind.GRAPH, ArchiveParts(program=GRAPH, tensors={}), model_name="m")
    archive = open_archive(data, "m.mar")
    try:
        built = build_model(archive, TARGET)
    except LoadError:
        pytest.fail("the smallest graph is sound")
    assert isinstance(built.body, RowModel)
    kept = keep_archive(archive, built.body.family)
    assert kept is not None
    assert json.loads(kept.shared["graph.json"]) == json.loads(GRAPH)
    assert built.row is not None
    assert restore_model("m.mar", kept, built.row, TARGET).family.key == built.body.family.key


def test_what_was_not_kept_makes_no_model() -> None:
    """A record without its members, or with a row of another length, is refused."""
    archive = open_archive(pack_small("mlp"), "m.mar")
    built = build_model(archive, TARGET)
    assert isinstance(built.body, RowModel)
    kept = keep_archive(archive, built.body.family)
    assert kept is not None
    with pytest.raises(LoadError, match="was not kept"):
        restore_model("m.mar", msgspec.structs.replace(kept, own={}), np.zeros(4, np.float32), TARGET)
    with pytest.raises(LoadError, match="numbers"):
        restore_model("m.mar", kept, np.zeros(4, np.float32), TARGET)

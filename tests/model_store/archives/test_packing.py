"""Packing: valid MARs, the same bytes for the same input, nothing packed that a server would refuse."""

import hashlib
import io
import json
import zipfile

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from handlers.kinds import ArchiveParts, pack_model
from model_store.archives.archive import open_archive
from model_store.archives.manifest import Kind, Spec, Weights
from model_store.archives.packing import pack_archive
from model_store.errors import ArchiveInvalid
from tests.archives import CONFIG, make_forecaster, make_tensors

ONNX = Spec(kind=Kind.ONNX, weights=Weights(file="model.onnx"))
NAMES = st.from_regex(r"[a-z]{1,8}(/[a-z]{1,8})?", fullmatch=True)


def test_the_result_is_a_mar() -> None:
    """Any zip tool lists plain stored files with fixed dates, and the manifest is the one TorchServe users know."""
    with zipfile.ZipFile(io.BytesIO(make_forecaster(name="NSW1"))) as packed:
        assert packed.testzip() is None
        infos = packed.infolist()
        manifest = json.loads(packed.read("MAR-INF/MANIFEST.json"))
    assert [info.filename for info in infos] == [
        "MAR-INF/MANIFEST.json",
        "fleetcast.json",
        "golden.json",
        "weights.safetensors",
    ]
    facts = {(info.date_time, info.compress_type, info.external_attr >> 16, info.create_system) for info in infos}
    assert facts == {((1980, 1, 1, 0, 0, 0), zipfile.ZIP_STORED, 0o100644, 3)}
    model = manifest["model"]
    assert (model["modelName"], model["modelVersion"]) == ("NSW1", "1.0")
    assert (model["handler"], model["serializedFile"]) == ("fleetcast", "weights.safetensors")
    assert (manifest["createdOn"], manifest["runtime"]) == ("01/01/1980 00:00:00", "python")


def test_the_bytes_do_not_change_between_releases() -> None:
    """Archives are cached by content: a change of these bytes is a change of the format and must be meant."""
    packed = pack_model(Kind.ONNX, ArchiveParts(program=b"model"), model_name="m")
    assert hashlib.sha256(packed).hexdigest() == "e4d6e9396613c740867d38aba1c6836b65a985dc1c35720bbf8ab20a8a0784ce"


@settings(max_examples=30)  # each is packed twice and read
@given(st.lists(st.tuples(NAMES, st.binary(max_size=50)), max_size=6, unique_by=lambda pair: pair[0]), st.data())
def test_packing_depends_on_content_alone(pairs: list[tuple[str, bytes]], data: st.DataObject) -> None:
    """The order of members does not matter, and neither does the clock; every member is read back."""
    members = dict([*pairs, ("model.onnx", b"m")])
    packed = pack_archive(ONNX, members, model_name="m")
    shuffled = dict(data.draw(st.permutations(list(members.items()))))
    assert pack_archive(ONNX, shuffled, model_name="m") == packed
    opened = open_archive(packed, "m")
    assert {name: opened.read(name) for name in members} == members


def test_the_order_and_layout_of_tensors_do_not_matter() -> None:
    """A transposed view and its copy are the same numbers, so they are the same archive."""
    tensors = make_tensors()
    views = {name: np.asfortranarray(tensor) for name, tensor in reversed(tensors.items())}
    one = pack_model(
        Kind.FORECASTER, ArchiveParts(tensors=tensors, architecture="sketch", config=CONFIG), model_name="m"
    )
    two = pack_model(
        Kind.FORECASTER,
        ArchiveParts(tensors=views, architecture="sketch", config=dict(reversed(CONFIG.items()))),
        model_name="m",
    )
    assert one == two


def test_other_numbers_are_another_archive() -> None:
    """The content decides, so a retrained model is noticed."""
    assert make_forecaster(0) != make_forecaster(1)


def test_the_weights_are_bound_by_their_hash() -> None:
    """`weights.sha256` is filled in, and one that was given must be right."""
    archive = open_archive(pack_archive(ONNX, {"model.onnx": b"m"}, model_name="m"), "m")
    assert archive.spec is not None
    assert archive.spec.weights.sha256 == hashlib.sha256(b"m").hexdigest()
    wrong = Spec(kind=Kind.ONNX, weights=Weights(file="model.onnx", sha256="0" * 64))
    with pytest.raises(ArchiveInvalid, match=r"'model\.onnx' has sha256"):
        pack_archive(wrong, {"model.onnx": b"m"}, model_name="m")


@pytest.mark.parametrize(
    ("spec", "members", "said"),
    [
        (ONNX, {}, "`weights.file` names 'model.onnx'"),
        (ONNX, {"model.onnx": b"", "../up": b""}, "segment '..'"),
        (ONNX, {"model.onnx": b"", "fleetcast.json": b""}, "fleetcast.json is written by packing"),
        (ONNX, {"model.onnx": b"", "MAR-INF/MANIFEST.json": b""}, "MANIFEST.json is written by packing"),
        (ONNX, {"model.onnx": b"", "a\0b": b""}, "'a\\x00b' would be lost"),
        (ONNX, {"model.onnx": b"", "./a": b""}, "'./a' would be lost"),
        (msgspec.structs.replace(ONNX, description="x" * 2001), {"model.onnx": b""}, "$.description"),
        (Spec(kind=Kind.ONNX, weights=Weights(file="a"), golden="b"), {"a": b"", "b": b"{}"}, "b: Object missing"),
        (Spec(kind=Kind.FORECASTER, architecture="tcn", weights=Weights(file="w")), {"w": b"pickle"}, "safetensors"),
    ],
)
def test_what_a_server_would_refuse_is_not_packed(spec: Spec, members: dict[str, bytes], said: str) -> None:
    """The result is opened and read before it is handed out."""
    with pytest.raises(ArchiveInvalid) as caught:
        pack_archive(spec, members, model_name="m")
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("tensor", "said"), [(np.ones(2), "'w' is F64"), (np.array([np.inf], np.float32), "'w' has 1 values")]
)
def test_tensors_that_cannot_be_served_are_not_packed(tensor: np.ndarray[tuple[int, ...], np.dtype], said: str) -> None:
    """float64 is not narrowed silently, and a diverged training is noticed before upload."""
    with pytest.raises(ArchiveInvalid, match=said):
        pack_model(
            Kind.FORECASTER, ArchiveParts(tensors={"w": tensor}, architecture="sketch", config={}), model_name="m"
        )

"""Reading archives: kinds, records and weights. What a hostile container may try is in `test_containers.py`."""

import json
import tarfile

import numpy as np
import pytest
import safetensors.numpy

from model_store.archives.archive import check_tensors, open_archive, read_tensors
from model_store.errors import ArchiveInvalid
from tests.archives import GOLDEN, make_forecaster, make_tar_gz, make_tensors, make_zip, repack

MODEL = {"model.onnx": b"numbers"}


def safetensors_header(header: object, body: bytes = b"") -> bytes:
    """A safetensors file around a header that its own writer would refuse."""
    raw = json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + body


@pytest.mark.parametrize("top", ["", "NSW1/", "./"])
@pytest.mark.parametrize("style", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_tar_reads_like_the_zip_it_was_made_from(top: str, style: int) -> None:
    """Members, records and tensors do not depend on container, tar dialect or the single top folder."""
    zipped = open_archive(make_forecaster(), "m")
    tarred = open_archive(make_tar_gz({name: zipped.read(name) for name in zipped.members}, top=top, style=style), "m")
    assert tarred.members == zipped.members
    assert (tarred.spec, tarred.mar, tarred.golden()) == (zipped.spec, zipped.mar, GOLDEN)
    for name, tensor in read_tensors(zipped).items():
        np.testing.assert_array_equal(read_tensors(tarred)[name], tensor)


@pytest.mark.parametrize("style", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_long_paths_survive_every_tar_dialect(style: int) -> None:
    """Paths beyond the 100 bytes of a plain header come in three notations."""
    name = "/".join(["folder" * 10] * 3) + "/file"
    assert open_archive(make_tar_gz({**MODEL, name: b"x"}, style=style), "m").read(name) == b"x"


def test_deflated_members_are_read() -> None:
    """`torch-model-archiver` deflates; the model is the same."""
    content = bytes(range(256)) * 8
    archive = open_archive(make_zip({"model.onnx": content}, deflate=True), "m")
    assert archive.read("model.onnx") == content


def test_folders_and_names_beyond_ascii_are_fine() -> None:
    """Folder entries leave no member, and names may be any printable text."""
    archive = open_archive(make_zip({"données/": b"", "données/prix.txt": b"1", **MODEL}), "m")
    assert archive.members == ("données/prix.txt", "model.onnx")


def test_repr_says_what_the_archive_is() -> None:
    """One honest line for logs."""
    assert repr(open_archive(make_forecaster(), "au/NSW1.mar")) == "<Archive au/NSW1.mar: forecaster sketch, 4 members>"
    assert repr(open_archive(make_zip(MODEL), "m")) == "<Archive m: no fleetcast.json, 1 members>"


# --- records


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"fleetcast_json": b"{"}, "fleetcast.json: "),
        ({"fleetcast_json": b'{"kind": "forecaster", "weights": 3}'}, "fleetcast.json: Expected `object`, got `int`"),
        ({"fleetcast_json": b'{"kind": "graph", "weights": {"file": "gone"}}'}, "`weights.file` names 'gone'"),
        (
            {"fleetcast_json": b'{"kind": "graph", "weights": {"file": "golden.json"}, "golden": "gone"}'},
            "`golden` names 'gone'",
        ),
        ({"MAR_INF_MANIFEST_json": b'{"model": {"handler": 3}}'}, "MAR-INF/MANIFEST.json: Expected `str`, got `int`"),
        ({"fleetcast_json": b" " * (5 << 20)}, "fleetcast.json has 5242880 bytes"),
    ],
)
def test_a_bad_record_names_archive_file_and_field(changes: dict[str, bytes], said: str) -> None:
    """Nothing is guessed where `fleetcast.json` or the MAR manifest are wrong."""
    with pytest.raises(ArchiveInvalid) as caught:
        open_archive(repack(make_forecaster(), **changes), "au/NSW1.mar")
    assert str(caught.value).startswith("au/NSW1.mar: ")
    assert said in str(caught.value)


def test_a_bad_golden_sample_names_its_member() -> None:
    """It is parsed when asked for, with the same care."""
    archive = open_archive(repack(make_forecaster(), golden_json=b'{"request": {}}'), "m")
    with pytest.raises(ArchiveInvalid, match=r"m: golden\.json: .*`response`"):
        archive.golden()


def test_an_archive_without_golden_sample_has_none() -> None:
    """It is optional."""
    assert open_archive(make_forecaster(golden=None), "m").golden() is None
    assert open_archive(make_zip(MODEL), "m").golden() is None


# --- weights


def test_tensors_come_back_as_packed() -> None:
    """Names, shapes and every bit."""
    found = read_tensors(open_archive(make_forecaster(3), "m"))
    for name, tensor in make_tensors(3).items():
        assert found[name].dtype == np.float32
        np.testing.assert_array_equal(found[name], tensor)


def test_other_weights_than_the_packed_ones_are_refused() -> None:
    """The sha256 in `fleetcast.json` binds the numbers."""
    changed = repack(make_forecaster(0), weights_safetensors=safetensors.numpy.save(make_tensors(1)))
    with pytest.raises(ArchiveInvalid, match=r"m: 'weights\.safetensors' has sha256 [0-9a-f]{64}, but fleetcast\.json"):
        open_archive(changed, "m").weights()


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        (safetensors.numpy.save({"b": np.ones(2, np.float16)}), "'b' is F16; convert it to float32"),
        (safetensors.numpy.save({"b": np.ones(2, np.int64)}), "'b' is I64"),
        (safetensors_header({"b": {"dtype": "BF16", "shape": [1], "data_offsets": [0, 2]}}, b"ab"), "'b' is BF16"),
        (safetensors.numpy.save({"b": np.array([1, np.nan, np.inf], np.float32)}), "'b' has 2 values that are NaN"),
        (safetensors_header({"b": {"dtype": "F32", "shape": [0, 2**62], "data_offsets": [0, 0]}}), "impossible shape"),
        (safetensors_header({"b": {"dtype": "F32", "shape": [4], "data_offsets": [0, 8]}}, b"12345678"), "not sound"),
        ((2**60).to_bytes(8, "little") + b"{}", f"header of {2**60} bytes is too large"),
        (safetensors.numpy.save({"b": np.ones(9, np.float32)})[:-1], "not sound safetensors"),
        (b"", "not sound safetensors"),
        (b"\x80\x04N.", "it is not safetensors"),
    ],
)
def test_bad_tensors_are_refused(weights: bytes, said: str) -> None:
    """float32 and finite, or an error that names archive, member and tensor; a pickle is not even looked at."""
    spec = b'{"kind": "forecaster", "architecture": "tcn", "weights": {"file": "w"}}'
    archive = open_archive(make_zip({"fleetcast.json": spec, "w": weights}), "au/NSW1.mar")
    with pytest.raises(ArchiveInvalid) as caught:
        read_tensors(archive)
    assert str(caught.value).startswith("au/NSW1.mar: w: ")
    assert said in str(caught.value)


def test_tensors_of_the_right_names_and_shapes_pass() -> None:
    """Order does not matter."""
    check_tensors(make_tensors(), {"layers.0.weight": (4, 2, 3), "head.weight": (3, 4), "head.bias": (3,)}, "m")


def test_tensors_of_another_architecture_are_listed() -> None:
    """Missing, unexpected and misshapen tensors are all told at once, but never a thousand of them."""
    tensors = {"a": np.zeros((2, 3), np.float32), **{f"extra.{i}": np.zeros(1, np.float32) for i in range(1000)}}
    with pytest.raises(ArchiveInvalid) as caught:
        check_tensors(tensors, {"a": (3, 2), "b": (1,)}, "m")
    said = str(caught.value)
    assert said.startswith("m: ")
    assert "missing: 'b'" in said
    assert "wrong shape: 'a' is [2, 3] instead of [3, 2]" in said
    assert "unexpected: 'extra.0'" in said
    assert "and 995 more" in said
    assert len(said) < 500


def test_a_missing_member_is_named() -> None:
    """Reading what is not there is an error of the archive."""
    with pytest.raises(ArchiveInvalid, match="m: it has no member 'gone'"):
        open_archive(make_zip(MODEL), "m").read("gone")

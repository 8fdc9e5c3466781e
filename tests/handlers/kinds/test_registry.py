"""The registry of kinds: which kind an archive is of, what each packs, and what comes back."""

import io
import zipfile
from collections.abc import Callable

import pytest

from handlers.kinds import ArchiveParts, build_model, describe_kind, find_kind, pack_model, tensor_inputs
from model_store.archives.archive import open_archive
from model_store.archives.manifest import Kind
from model_store.errors import ArchiveInvalid, UnsupportedKind
from tests.archives import make_forecaster, make_mar_manifest, make_tar_gz, make_zip


@pytest.mark.parametrize("build", [make_zip, make_tar_gz])
@pytest.mark.parametrize(
    ("members", "kind"),
    [
        ({"model.onnx": b""}, Kind.ONNX),
        (make_mar_manifest("image_classifier", "net.onnx") | {"net.onnx": b""}, Kind.ONNX),
        (make_mar_manifest("handler.py", "net.onnx") | {"net.onnx": b"", "handler.py": b""}, Kind.CODE),
        (make_mar_manifest("service.py:handle") | {"service.py": b""}, Kind.CODE),
        (make_mar_manifest("service:handle") | {"service.py": b""}, Kind.CODE),
        (make_mar_manifest("image_classifier", "net.pt") | {"net.pt": b""}, Kind.CODE),
        (make_mar_manifest("base", "net.pt") | {"net.pt": b""}, Kind.CODE),
        ({"code/inference.py": b"", "model.pth": b""}, Kind.CODE),
        ({"code/serve.py": b"", "model.onnx": b""}, Kind.CODE),
        ({"inference.py": b"", "model.onnx": b""}, Kind.CODE),
    ],
)
def test_the_kind_is_decided_by_what_lies_in_the_archive(
    build: Callable[[dict[str, bytes]], bytes], members: dict[str, bytes], kind: Kind
) -> None:
    """Handlers of TorchServe, Multi Model Server and SageMaker make code, `.onnx` files make onnx, in that order."""
    assert find_kind(open_archive(build(members), "m")).kind is kind


def test_fleetcast_json_goes_before_every_handler() -> None:
    """A forecaster with a Python handler beside it, for the sake of another server, is a forecaster."""
    with zipfile.ZipFile(io.BytesIO(make_forecaster())) as packed:
        members = {name: packed.read(name) for name in packed.namelist()}
    archive = open_archive(make_zip({**members, **make_mar_manifest("handler.py"), "handler.py": b""}), "m")
    assert find_kind(archive).kind is Kind.FORECASTER
    assert archive.mar is not None
    assert archive.mar.model.handler == "handler.py"


def test_other_kinds_are_refused_by_name() -> None:
    """The error says which kind, and what will run it."""
    code = open_archive(make_zip(make_mar_manifest("h.py") | {"h.py": b""}), "my.mar")
    with pytest.raises(UnsupportedKind, match=r"my\.mar is a code archive \(TorchServe handler 'h\.py'\).*child"):
        build_model(code)
    with pytest.raises(UnsupportedKind, match="code archive"):
        tensor_inputs(code)
    assert describe_kind(code)["code"]["style"] == "torchserve"
    with pytest.raises(UnsupportedKind, match="torch-model-archiver"):
        pack_model(Kind.CODE, ArchiveParts(), model_name="m")


def test_a_graph_without_its_operators_is_refused() -> None:
    """They are a record, whose size is bounded."""
    spec = b'{"kind": "graph", "weights": {"file": "w"}}'
    with pytest.raises(ArchiveInvalid, match=r"m: fleetcast\.json says graph, but graph\.json"):
        build_model(open_archive(make_zip({"fleetcast.json": spec, "w": b""}), "m"))
    with pytest.raises(ArchiveInvalid, match=r"m: graph\.json has 5242880 bytes"):
        build_model(open_archive(make_zip({"fleetcast.json": spec, "w": b"", "graph.json": b" " * (5 << 20)}), "m"))


def test_an_archive_of_no_kind_says_what_was_looked_for() -> None:
    """The author learns what is missing, and what the manifest promised."""
    with pytest.raises(ArchiveInvalid, match=r"m: .*neither fleetcast\.json.*model\.onnx.*'readme\.md'"):
        find_kind(open_archive(make_zip({"readme.md": b"", "a/b": b""}), "m"))
    with pytest.raises(ArchiveInvalid, match=r"names handler 'gone\.py' and file 'gone\.onnx'"):
        find_kind(open_archive(make_zip(make_mar_manifest("gone.py", "gone.onnx")), "m"))

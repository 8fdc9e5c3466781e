"""Code archives: what would run, what it needs, and that nothing of it runs here."""

import ast
import io
import json
import os
import pickle
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch

from handlers.kinds import build_model, describe_kind, find_kind
from handlers.kinds.code.entry_point import CodeStyle, EntryPoint, find_entry_point, refuse_requirements
from handlers.kinds.code.model_file import describe_model_file
from handlers.kinds.code.source_reader import read_source
from model_store.archives.archive import Archive, open_archive
from model_store.archives.manifest import Kind
from model_store.errors import ArchiveInvalid, UnsupportedKind
from server.offline.archive_tools import REQUIREMENTS_ADVICE, describe_archive, format_description
from tests.archives import make_mar_manifest, make_tar_gz, make_zip

TRAP = b"import sys\nsys.modules['sprung'] = sys\n"


def make_mar(handler: str, **members: bytes) -> Archive:
    """A TorchServe archive; `a__b` stands for the member `a/b.py`."""
    files = {f"{name.replace('__', '/')}.py": data for name, data in members.items()}
    return open_archive(make_zip({**make_mar_manifest(handler), **files}), "m.mar")


def make_mms(handler: str) -> Archive:
    """An archive as model-archiver writes it."""
    manifest = {"modelServerVersion": "1.0", "runtime": "python", "model": {"modelName": "m", "handler": handler}}
    members = {"MAR-INF/MANIFEST.json": json.dumps(manifest).encode(), "service.py": b""}
    return open_archive(make_zip(members), "m.mar")


@pytest.mark.parametrize(
    ("archive", "entry"),
    [
        (make_mar("h.py", h=b""), EntryPoint(CodeStyle.TORCHSERVE, "h")),
        (make_mar("h", h=b""), EntryPoint(CodeStyle.TORCHSERVE, "h")),
        (make_mar("h.py:go", h=b""), EntryPoint(CodeStyle.TORCHSERVE, "h", "go")),
        (make_mar("/home/me/h.py", h=b""), EntryPoint(CodeStyle.TORCHSERVE, "h")),
        (make_mar("lib/h.py:go", lib__h=b"", other=b""), EntryPoint(CodeStyle.TORCHSERVE, "h", "go", "lib")),
        (make_mar("text_classifier"), EntryPoint(CodeStyle.TORCHSERVE, "text_classifier", from_package=True)),
        (make_mar("text_classifier", text_classifier=b""), EntryPoint(CodeStyle.TORCHSERVE, "text_classifier")),
        (make_mms("service.py:handle"), EntryPoint(CodeStyle.MMS, "service", "handle")),
        (
            open_archive(make_tar_gz({"code/inference.py": b"", "inference.py": b"", "model.pth": b""}), "m.tar.gz"),
            EntryPoint(CodeStyle.SAGEMAKER, "inference", folder="code"),
        ),
        (open_archive(make_tar_gz({"inference.py": b"", "m": b""}), "m"), EntryPoint(CodeStyle.SAGEMAKER, "inference")),
    ],
)
def test_the_entry_point_is_the_one_that_the_archives_own_server_would_run(archive: Archive, entry: EntryPoint) -> None:
    """Whatever way its archiver writes the handler's name."""
    assert find_kind(archive).kind is Kind.CODE
    assert find_entry_point(archive) == entry


def test_an_archive_whose_handler_is_missing_says_what_was_looked_for() -> None:
    """By the manifest's name and the scripts that are there."""
    serialized = make_mar_manifest("gone.py", "net.pt") | {"net.pt": b"", "other.py": b""}
    with pytest.raises(ArchiveInvalid, match=r"m: .*handler 'gone\.py'.*code/inference\.py.*'other\.py'"):
        find_entry_point(open_archive(make_zip(serialized), "m"))
    archive = open_archive(make_tar_gz({"code/serve.py": b"", "code/in/serve.py": b"", "model.pth": b""}), "m")
    with pytest.raises(ArchiveInvalid, match=r"its scripts: 'code/in/serve\.py', 'code/serve\.py'"):
        find_entry_point(archive)
    for program, folder in (("serve.py", "code"), ("in/serve.py", "code/in")):
        assert find_entry_point(archive, program) == EntryPoint(CodeStyle.SAGEMAKER, "serve", folder=folder)


def test_code_runs_in_no_process_that_reads_archives() -> None:
    """`verify` and the other tools refuse it by what it is, and import nothing of it."""
    with pytest.raises(UnsupportedKind, match=r"m\.mar is a code archive \(TorchServe handler 'h\.py'\).*child"):
        build_model(make_mar("h.py", h=TRAP))
    describe_kind(make_mar("h.py", h=TRAP))
    assert "sprung" not in sys.modules


def test_requirements_are_refused_with_advice() -> None:
    """A server installs nothing for an archive."""
    refuse_requirements(make_mar("h.py", h=b""))
    members = {**make_mar_manifest("h.py"), "h.py": b"", "requirements.txt": b"left-pad"}
    with pytest.raises(UnsupportedKind, match=r"m: 'requirements\.txt' .*install them beside the server"):
        refuse_requirements(open_archive(make_zip(members), "m"))
    with pytest.raises(UnsupportedKind, match=r"code/requirements\.txt"):
        refuse_requirements(
            open_archive(make_tar_gz({"code/inference.py": b"", "code/requirements.txt": b"", "m": b""}), "m")
        )


def test_inspect_explains_what_runs_and_what_it_needs() -> None:
    """In JSON, and as lines for people."""
    data = make_zip({**make_mar_manifest("h.py"), "h.py": TRAP, "requirements.txt": b"left-pad"})
    found = describe_archive(open_archive(data, "m.mar"), data)
    assert found["kind"] == "code"
    assert found["code"]["style"] == "torchserve"
    lines = list(format_description(found))
    assert ("code", "TorchServe handler 'h.py': handle, or initialize and handle of its only class") in lines
    assert [text for label, text in lines if label in ("needs", "missing", "requires", "serve")] == [
        "torch, which are installed here",
        REQUIREMENTS_ADVICE,
        "left-pad (not here)",
        "fleetcast serve --allow-code m.mar",
    ]
    data = make_zip({**make_mar_manifest("gone.py", "net.pt"), "net.pt": b""})
    (code,) = (
        text for label, text in format_description(describe_archive(open_archive(data, "m"), data)) if label == "code"
    )
    assert code.startswith("cannot run: m: MAR-INF/MANIFEST.json names the handler 'gone.py'")


SOURCE = b"""
import torch, sklearn.linear_model as lm, nosuch.a.b
from nosuch import c
from ts.torch_handler.text_classifier import TextClassifier
from . import helper
from .helper import more
import helper
try:
    import perhaps
except ImportError:
    perhaps = None
class Mine(TextClassifier):
    pass
"""


def explain(data: bytes) -> dict[str, Any]:
    """What `inspect` says of the code of an archive."""
    found: dict[str, Any] = describe_archive(open_archive(data, "m.mar"), data)["code"]
    return found


def save(module: torch.nn.Module, **how: Any) -> bytes:
    """The file that `torch.save` makes of its state."""
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer, **how)
    return buffer.getvalue()


def test_inspect_names_the_modules_that_are_missing_here() -> None:
    """By reading: those of the handler, and of what it takes from TorchServe; its own are no needs."""
    members = {
        "h.py": SOURCE,
        "helper.py": TRAP,
        "model-config.yaml": b"minWorkers: 2\nbatchSize: 4 # rows\nx:\n  batchSize: 9",
    }
    found = explain(make_zip({**make_mar_manifest("h.py"), **members}))
    assert found["calls"] == "initialize and handle of Mine"
    assert {"sklearn", "torch", "ts"} < set(found["needs"])
    first, *_, last = found["missing"]
    assert first == "nosuch, which h.py imports in line 2: pip install 'nosuch'"
    assert any(each.startswith("captum, which ts/torch_handler/text_") for each in found["missing"])
    assert last == "perhaps, which h.py imports in line 9, in a function or under a condition: pip install 'perhaps'"
    assert found["batches"] == (
        "up to 4 requests in one call, the first waits at most 100 ms; not kept here: minWorkers"
    )
    assert "sprung" not in sys.modules


def test_a_handler_of_torchserves_own_is_read_where_torchserve_lies() -> None:
    """Its modules are what the archive needs, though the archive has no line of code."""
    found = explain(make_zip({**make_mar_manifest("image_classifier", "net.pt"), "net.pt": b""}))
    assert found["calls"] == "handle, or initialize and handle of its only class"
    assert any(each.startswith("torchvision, which ts/torch_handler/") for each in found["missing"])


def test_a_script_is_explained_by_its_functions() -> None:
    """Those that it has, and those that are left to the toolkit."""
    script = b"import torch\ndef model_fn(d): pass\nasync def predict_fn(a, b): pass\n"
    found = explain(
        make_tar_gz({"code/inference.py": script, "model.pth": b"", "code/requirements.txt": b"torch>=2 # x\n-r more"})
    )
    assert found["style"] == "sagemaker"
    assert found["calls"] == "model_fn, predict_fn of the script; input_fn, output_fn of the toolkit's kind"
    assert (found["batches"], found["missing"]) == ("one by one", [])
    assert found["requirements"] == [f"torch>=2 (here: {version('torch')})", "-r more"]


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_files_of_weights_are_told_apart() -> None:
    """By what is in them, whatever their names; none is unpickled."""
    net = torch.nn.Linear(3, 2)
    script, program = io.BytesIO(), io.BytesIO()
    torch.jit.save(torch.jit.script(net), script)
    torch.export.save(torch.export.export(net, (torch.ones(1, 3),)), program)
    for raw, expected in (
        (save(net), "2 tensors of torch.save, pickled: the model file or the handler says whose they are"),
        (save(net, _use_new_zipfile_serialization=False), "weights of torch.save before torch 1.6 (pickled)"),
        (script.getvalue(), "TorchScript: it needs no model file"),
        (program.getvalue(), "a program of torch.export"),
        (pickle.dumps([1]), "a pickle, which runs code when read"),
        (safetensors.numpy.save({"a": np.ones(3, np.float32)}), "safetensors"),
        (make_zip({"a": b""}), "a zip"),
        (b"PK\1\2", "a zip"),
        (b"\x89HDF\r\n", "HDF5 (Keras)"),
        (b"", "unknown"),
    ):
        assert describe_model_file(raw, "net.bin") == expected
    found = explain(make_zip({**make_mar_manifest("h.py", "net.pt"), "h.py": b"", "net.pt": save(net), "a.onnx": b""}))
    assert list(found["model_files"]) == ["net.pt", "a.onnx"]
    assert found["model_files"]["a.onnx"] == "ONNX"


@pytest.mark.slow
def test_imports_are_those_that_a_parser_finds() -> None:
    """In modules of Python itself: every name, with its line, and whether it stands at the top."""
    for name in (
        "argparse",
        "asyncio/base_events",
        "json/decoder",
        "logging/config",
        "os",
        "pydoc",
        "tarfile",
        "typing",
    ):
        raw = (Path(os.__file__).parent / f"{name}.py").read_bytes()
        nodes = list(ast.walk(ast.parse(raw)))
        expected = {
            (alias.name, node.lineno, node.col_offset == 0)
            for node in nodes
            if isinstance(node, ast.Import)
            for alias in node.names
        }
        for node in nodes:
            if isinstance(node, ast.ImportFrom):
                dots, at = "." * node.level, (node.lineno, node.col_offset == 0)
                names = [node.module] if node.module else [alias.name for alias in node.names]
                expected |= {(f"{dots}{each}", *at) for each in names}
        source = read_source(raw)
        assert {(each.module, each.line, each.always) for each in source.imports} == expected, name
        assert [
            node.name for node in ast.parse(raw).body if isinstance(node, ast.FunctionDef | ast.ClassDef)
        ] == source.defines


@pytest.mark.slow
@pytest.mark.parametrize(
    "raw",
    [
        b"import a\nprint 'two'\nimport b",
        b"import a\nx = (" + b"(" * 100_000,
        b"import a\n\xff\xfe",
        b"import a\n\tif:\n  x\n",
    ],
)
def test_source_that_is_none_costs_nothing(raw: bytes) -> None:
    """What stands before the fault is read, and nothing is raised."""
    assert "a" in [each.module for each in read_source(raw).imports]
    assert read_source(b"\0" + raw) is not None

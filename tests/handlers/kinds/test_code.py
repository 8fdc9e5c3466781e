"""Code archives: what would run, what it needs, and that nothing of it runs here."""

import json
import sys

import pytest

from handlers.kinds import build_model, describe_kind, find_kind
from handlers.kinds.code.entry_point import CodeStyle, EntryPoint, find_entry_point, refuse_requirements
from model_store.archives.archive import Archive, open_archive
from model_store.archives.manifest import Kind
from model_store.errors import ArchiveInvalid, UnsupportedKind
from server.offline.archive_tools import describe_archive, format_description
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
    assert [text for label, text in lines if label == "needs"] == [
        "torch",
        "torchserve (ts), if it imports that",
        "the packages of requirements.txt, installed beside the server: pack without it",
    ]
    data = make_zip({**make_mar_manifest("gone.py", "net.pt"), "net.pt": b""})
    (code,) = (
        text for label, text in format_description(describe_archive(open_archive(data, "m"), data)) if label == "code"
    )
    assert code.startswith("cannot run: m: MAR-INF/MANIFEST.json names the handler 'gone.py'")

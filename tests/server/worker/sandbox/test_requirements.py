"""What a requirements.txt may name, and that it is installed for its archive alone, within its time and its disk."""

import asyncio
import io
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest

from model_store.errors import CodeFailed, UnsupportedKind
from model_store.names import ModelName
from server.worker.sandbox import requirements
from server.worker.sandbox.code_host import EVERY_KEY, CodeHost, CodePolicy
from server.worker.sandbox.requirements import MAX_LINES, read_requirements
from tests.patience import PATIENCE_S
from tests.server.worker.sandbox.code_archives import Asker, make_code_archive, start

MODEL = ModelName("m.mar")
MIB = 1024 * 1024
USER = """
import left_pad, sys
def handle(data, context):
    return data and [left_pad.pad(row["body"]) for row in data]
"""
WHEEL = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"


@pytest.mark.parametrize(
    "line",
    ["left-pad", "left_pad==1.0", "a.b[c,d] >= 1.0, < 2 ; python_version >= '3.9'", "a ~= 1.0  # why", "a (>=1)"],
)
def test_names_with_versions_are_taken(line: str) -> None:
    """As pip writes them; comments are left out."""
    assert read_requirements(MODEL, f"# all\n\n{line}\n".encode()) == [line.partition("#")[0].strip()]


@pytest.mark.parametrize(
    "line",
    [
        "--index-url http://evil",
        "-r other.txt",
        "-e .",
        "./wheel.whl",
        "a @ file:///etc/passwd",
        "git+https://host/a",
        "a==1 --hash=sha256:0",
        "a; extra == 'x' @ b",
        "../a",
        "a\\",
    ],
)
def test_all_else_is_refused_before_pip_is_asked(line: str) -> None:
    """Options, paths and addresses would choose what runs on the server, or where it comes from."""
    with pytest.raises(UnsupportedKind, match="is not a package's name with versions"):
        read_requirements(MODEL, line.encode())


def test_the_file_is_bounded() -> None:
    """In lines and bytes."""
    for data in (b"a\n" * (MAX_LINES + 1), b"#" * 100_000):
        with pytest.raises(UnsupportedKind, match="has more than"):
            read_requirements(MODEL, data)


def make_wheel(folder: Path, extra_bytes: int = 0) -> None:
    """The package left-pad 1.0, as a wheel in the folder."""
    info = "left_pad-1.0.dist-info"
    files = {
        "left_pad.py": "def pad(text): return text.rjust(5)\n" + "#" * extra_bytes,
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: left-pad\nVersion: 1.0\n",
        f"{info}/WHEEL": WHEEL,
    }
    files[f"{info}/RECORD"] = "".join(f"{name},,\n" for name in [*files, f"{info}/RECORD"])
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as wheel:
        for name, text in files.items():
            wheel.writestr(name, text)
    (folder / "left_pad-1.0-py3-none-any.whl").write_bytes(data.getvalue())


def make_host(**policy: Any) -> CodeHost:
    """A host that installs packages."""
    given: dict[str, Any] = {"install_s": PATIENCE_S, **policy}
    return CodeHost(CodePolicy((EVERY_KEY,), 256 * MIB, PATIENCE_S, **given))


@pytest.mark.slow
def test_packages_are_installed_for_their_archive_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its code imports them; the server and other archives do not have them, and they go with their archive."""
    pytest.importorskip("pip")
    make_wheel(tmp_path)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    host = make_host()

    async def ask() -> None:
        child = Asker(start(host, make_code_archive(USER, {"requirements.txt": "left-pad==1.0\nnumpy\n"})))
        folder = child.child.folder
        assert (await child.one("abc")).body == b"  abc"
        assert not list(folder.rglob("numpy*"))  # the server has it
        await child.close()
        assert not folder.exists()
        with pytest.raises(CodeFailed, match="No module named 'left_pad'"):
            start(host, make_code_archive(USER), "other.mar")

    asyncio.run(ask())
    assert "left_pad" not in sys.modules
    with pytest.raises(CodeFailed, match=r"could not be installed: .*right-pad"):
        start(host, make_code_archive(USER, {"requirements.txt": "right-pad"}))
    with pytest.raises(CodeFailed, match=r"could not be installed: .*numpy"):
        start(host, make_code_archive(USER, {"requirements.txt": "numpy<1"}))
    host.close()
    make_wheel(tmp_path, extra_bytes=2 * MIB)
    narrow = make_host(disk_bytes=MIB)
    with pytest.raises(CodeFailed, match="more than code_disk_bytes"):
        start(narrow, make_code_archive(USER, {"requirements.txt": "left-pad"}))
    narrow.close()


@pytest.mark.slow
def test_an_index_that_does_not_answer_costs_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pip is ended with all that it has started."""
    slow = tmp_path / "slow"
    slow.write_text(f"#!{sys.executable}\nimport time\ntime.sleep(1000)\n")
    slow.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(slow))
    (tmp_path / "tmp").mkdir()
    began = time.monotonic()
    with pytest.raises(CodeFailed, match=r"were not installed within 0\.2 s \(code_install_s\)"):
        requirements.install(MODEL, ["a"], tmp_path, 0.2)
    assert time.monotonic() - began < PATIENCE_S

"""Archives as the real torch-model-archiver makes them run unchanged, in each of its formats."""

import asyncio
import io
import json
import subprocess
import tarfile
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from model_store.archives.archive import open_archive
from model_store.errors import CodeFailed
from server.worker.sandbox.code_host import EVERY_KEY, CodeHost, CodePolicy
from tests.archiver import install_archiver
from tests.patience import PATIENCE_S
from tests.server.worker.sandbox.code_archives import Asker, start
from tests.server.worker.sandbox.test_torchserve_package import MIB, MINE, NET, Net

pytestmark = pytest.mark.slow

CONFIG = "batchSize: 4\nmaxBatchDelay: 20\nown:\n  factor: 2\n"


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what a user packs."""
    folder = tmp_path_factory.mktemp("desk")
    (folder / "mine.py").write_text(MINE)
    (folder / "net.py").write_text(NET)
    (folder / "config.yaml").write_text(CONFIG)
    (folder / "index_to_name.json").write_text('{"0": "sum"}')
    torch.save(Net().state_dict(), folder / "w.pt")
    return folder


@pytest.fixture(scope="module")
def host() -> Iterator[CodeHost]:
    """Children that may take long to import what they need."""
    host = CodeHost(CodePolicy((EVERY_KEY,), 1024 * MIB, PATIENCE_S))
    host.warm()
    yield host
    host.close()


def pack(desk: Path, commands: Path, layout: str, handler: str = "mine.py") -> Path:
    """What the archiver writes, in the format `default` (a zip), `tgz` or `no-archive` (a folder)."""
    out = desk / f"{layout}-{handler}"
    out.mkdir()
    line = [
        str(commands / "torch-model-archiver"), "--model-name", "sum", "--version", "2.5", "--model-file", "net.py",
        "--serialized-file", "w.pt", "--handler", handler, "--extra-files", "index_to_name.json",
        "--config-file", "config.yaml", "--archive-format", layout, "--export-path", str(out),
    ]  # fmt: skip
    done = subprocess.run(line, cwd=desk, capture_output=True, text=True, check=False, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr
    (made,) = out.iterdir()
    return made


def read(made: Path) -> bytes:
    """The archive's bytes; a folder is packed as it stands, as its owner puts it into a bucket."""
    if made.is_file():
        return made.read_bytes()
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:gz") as tar:
        for file in sorted(made.rglob("*")):
            tar.add(file, str(file.relative_to(made)), recursive=False)
    return data.getvalue()


def run(test: Coroutine[Any, Any, None]) -> None:
    """In a loop of its own."""
    asyncio.run(test)


@pytest.mark.parametrize("layout", ["default", "tgz", "no-archive"])
def test_each_format_runs_unchanged(
    host: CodeHost, desk: Path, tmp_path_factory: pytest.TempPathFactory, layout: str
) -> None:
    """A handler of the wheel's base class, an eager model, a config and an extra file."""
    pytest.importorskip("ts")
    pytest.importorskip("yaml")
    made = pack(desk, install_archiver(tmp_path_factory.getbasetemp()), layout)
    archive = open_archive(read(made), made.name)

    async def ask() -> None:
        child = Asker(start(host, archive, made.name))
        assert (child.child.loaded.batch_size, child.child.loaded.max_batch_delay_s) == (4, 0.02)
        outcome = await child.batch('{"x": [1, 2]}', '{"x": [3, 4]}', content_type="application/json")
        assert isinstance(outcome, list)
        assert [json.loads(answer.body) for answer in outcome] == [[3.0], [7.0]]
        await child.close()

    run(ask())


def test_a_handler_of_the_wheels_own_runs_by_its_name(
    host: CodeHost, desk: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """`base_handler` loads the model; one whose own packages are missing says which."""
    pytest.importorskip("ts")
    pytest.importorskip("yaml")
    commands = install_archiver(tmp_path_factory.getbasetemp())
    archive = open_archive(read(pack(desk, commands, "default", "base_handler")), "sum.mar")

    async def ask() -> None:
        child = Asker(start(host, archive, "sum.mar"))
        answer = await child.one('{"x": [1, 2]}', "application/json")  # it takes numbers, not parts: as in TorchServe
        assert (answer.status, answer.message) == (503, "Prediction failed")
        await child.close()

    run(ask())
    image = open_archive(read(pack(desk, commands, "default", "image_classifier")), "image.mar")
    with pytest.raises(CodeFailed, match="image_classifier imports torchvision, which is not installed beside"):
        start(host, image, "image.mar")

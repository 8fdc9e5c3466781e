"""CONTRIBUTING's pages on a new architecture and a new kind, followed word by word on a copy of the tree."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from datetime import datetime, timedelta
from math import sin
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
START = datetime(2024, 3, 1)  # noqa: DTZ001 -- the stamps of a price file have no zone
COMMAND = (sys.executable, "-P", "-c", "from server.cli.main import main; main()")
PACK = """
import sys
import numpy as np
from pathlib import Path
from handlers.kinds import ArchiveParts, pack_model
from model_store.archives.manifest import GoldenSample, Kind
golden = GoldenSample(request={"x": [1.0, -2.0]}, response={"predictions": [3.0, -6.0]})
parts = ArchiveParts(tensors={"factor": np.array([3.0], np.float32)})
Path(sys.argv[1]).write_bytes(pack_model(Kind("scale"), parts, model_name="triple", golden=golden))
"""


def read_blocks(title: str) -> list[str]:
    """The code blocks of one page of CONTRIBUTING."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    (page,) = (each for each in text.split("\n## ") if each.startswith(f"{title}\n"))
    return re.findall(r"```(?:python|text)\n(.*?)```", page, re.DOTALL)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the packages, their tests and settings."""
    copy = tmp_path / "tree"
    for folder in ("server", "handlers", "model_store", "loadtest", "docs", "tests"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", copy)
    return copy


def add_file(tree: Path, block: str) -> None:
    """A block that begins with its path is that file."""
    path, _, text = block.partition("\n")
    (tree / path.removeprefix("# ")).write_text(text)


def insert(tree: Path, file: str, before: str, line: str) -> None:
    """The line before the only place in the file that is `before`."""
    text = (tree / file).read_text()
    assert text.count(before) == 1, f"{file} has {before!r} {text.count(before)} times"
    (tree / file).write_text(text.replace(before, line + before))


def run(tree: Path, *command: str) -> str:
    """What the command prints, run with the copy's packages."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "COLUMNS": "200"}
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_page_on_a_new_architecture_is_true(tree: Path, tmp_path: Path) -> None:
    """Its file and its line: help and reference list it, it is trained, packed, proved, and tested as others."""
    file, line = read_blocks("A new architecture")
    add_file(tree, file)
    insert(tree, "handlers/architectures.py", "    }\n)\n", line)
    assert f"{line.strip().split(':')[0].strip(chr(34))}: one linear layer" in run(tree, *COMMAND, "train", "--help")
    run(tree, sys.executable, "docs/write_reference.py")
    assert (
        "| `linear` | one linear layer over the whole context |"
        in (tree / "docs/reference/architectures.md").read_text()
    )
    prices, store = tmp_path / "prices.csv", tmp_path / "store"
    with prices.open("w") as out:
        rows = csv.writer(out)
        rows.writerow(["hour", "price"])
        rows.writerows([START + timedelta(hours=h), 50 + 20 * sin(h / 4)] for h in range(600))
    trained = ("--architecture", "linear", "--context-length", "30", "--prediction-length", "12", "--epochs", "0.1")
    made = ("--keep-worse", "--out", str(store))
    run(tree, *COMMAND, "train", str(prices), "--time", "hour", "--target", "price", *trained, *made)
    proof = run(tree, *COMMAND, "verify", str(store / "price.mar"))
    assert "linear-" in proof
    assert "golden sample reproduced" in proof
    tests = run(
        tree, sys.executable, "-m", "pytest", "-q", "tests/handlers/forecasters/test_forecasters.py", "-k", "linear"
    )
    assert int(re.findall(r"(\d+) passed", tests)[0]) >= 3


def test_the_page_on_a_new_kind_is_true(tree: Path, tmp_path: Path) -> None:
    """Its file and its lines: an archive of the kind is packed, proved by its golden sample, and described."""
    name, file, entry = read_blocks("A new kind")
    add_file(tree, file)
    insert(tree, "model_store/archives/manifest.py", '    CORRELATION = "correlation"\n', name)
    insert(tree, "handlers/kinds/__init__.py", "    OnnxKind(),\n", entry)
    insert(
        tree,
        "handlers/kinds/__init__.py",
        "from model_store.archives.archive import",
        "from handlers.kinds.scale import ScaleKind\n",
    )
    archive = tmp_path / "triple.mar"
    run(tree, sys.executable, "-P", "-c", PACK, str(archive))
    assert "golden sample reproduced" in run(tree, *COMMAND, "verify", str(archive))
    assert json.loads(run(tree, *COMMAND, "inspect", str(archive), "--json"))["factor"] == [3.0]

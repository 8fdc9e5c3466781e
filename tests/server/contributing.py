"""The pages of CONTRIBUTING, followed literally: their code blocks are put into a scratch copy of the tree."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def read_steps(page: str) -> list[str]:
    """The Python code blocks of a page, in order."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    found = re.search(rf"^## {page}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert found is not None, f"CONTRIBUTING has no page {page!r}"
    return re.findall(r"^```python\n(.*?)^```", found[1], re.MULTILINE | re.DOTALL)


def copied_tree(tree: Path) -> Path:
    """A scratch copy of the code and its pages of reference."""
    unwanted = shutil.ignore_patterns("__pycache__", "records")
    for package in ("server", "handlers", "model_store", "loadtest", "docs"):
        shutil.copytree(ROOT / package, tree / package, ignore=unwanted)
    return tree


def run_in(tree: Path, *arguments: str, **variables: str) -> str:
    """What Python prints, run in the copy and with its code."""
    environment = {**os.environ, "PYTHONPATH": str(tree), **variables}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=True).stdout

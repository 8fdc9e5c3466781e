"""`make gpu` without a GPU, and its steps: limits, programs that are missing, the record's contents."""

import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
from typer.testing import CliRunner

from loadtest import record
from loadtest.benchmarks import first_gpu
from loadtest.benchmarks.first_gpu import CHECKS, ROOT, Step, describe_ends, list_steps, run_step
from tests.patience import PATIENCE_S


@pytest.mark.slow
def test_without_a_gpu_it_says_so_at_once_and_makes_nothing(tmp_path: Path) -> None:
    """The sentence and exit code 2, before any environment is made or torch is imported."""
    found = CliRunner().invoke(first_gpu.app, ["--dev", str(tmp_path)])
    assert (found.exit_code, found.stderr) == (2, first_gpu.NO_GPU + "\n")
    if not any(any(Path("/dev").glob(pattern)) for pattern in first_gpu.NODES):
        command = ["make", "--no-print-directory", "gpu"]
        made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert made.returncode == 2
        assert made.stdout == first_gpu.NO_GPU + "\n"
        assert not (ROOT / ".venv-cuda").exists()
    imported = "import sys, loadtest.benchmarks.first_gpu; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", imported], cwd=ROOT, check=True, timeout=PATIENCE_S)


def test_every_check_of_the_server_is_a_step_with_a_limit() -> None:
    """In the server's order: the one that ruins its context comes last."""
    from server.worker.engine import gpu_checks  # noqa: PLC0415 -- torch

    assert list(CHECKS) == list(gpu_checks.CHECKS)
    names = [step.name for step in list_steps()]
    assert [name for name in names if name in CHECKS] == list(CHECKS)
    assert {"tests", "benchmark", "compute-sanitizer"} <= set(names)


@pytest.mark.slow
def test_each_step_ends_and_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    """By itself, with an error, at its limit with all that it started, or not at all."""
    child = "import subprocess, sys; print('begun', flush=True); subprocess.run(['sleep', '3600'])"
    ends = [
        run_step(Step("good", (sys.executable, "-c", "print('a fact')"), PATIENCE_S)),
        run_step(Step("bad", (sys.executable, "-c", "raise SystemExit('no')"), PATIENCE_S)),
        run_step(Step("endless", (sys.executable, "-c", child), 3)),
        run_step(Step("missing", ("no-such-program",), 1, needs="no-such-program")),
    ]
    assert [end.outcome for end in ends] == ["ok", "failed", "too long", "skipped"]
    assert [end.code for end in ends] == [0, 1, -9, None]
    assert [end.said for end in ends][:2] == ["a fact\n", "no\n"]
    assert "no-such-program is not installed" in ends[3].said
    told = capsys.readouterr().out
    assert all(f"== {end.name}: {end.outcome}" in told for end in ends)
    described = describe_ends(ends)
    assert described["outcomes"] == {"failed": 1, "ok": 1, "skipped": 1, "too long": 1}


def test_a_record_names_the_build_for_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where ONNX Runtime is installed as `onnxruntime-gpu` there is no package `onnxruntime`."""

    def find(name: str) -> str:
        if name == "onnxruntime":
            raise PackageNotFoundError(name)
        return "1.31.1" if name == "onnxruntime-gpu" else "1.0"

    monkeypatch.setattr(record, "version", find)
    packages = record.describe_machine()["packages"]
    assert (packages["onnxruntime"], packages["torch"]) == ("1.31.1 (gpu)", "1.0")

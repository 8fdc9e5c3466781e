"""The first ten minutes on a real GPU: checks, suites and the benchmark, each a process with a limit. Saves a record.

No record of it exists until it has run on a real GPU. `make gpu` makes the environment for CUDA and runs it. Without a
GPU it says so in a second and exits with code 2; with one the exit code is 1 if a step failed or did not end in time.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer

from loadtest import record

SEED = 7  #: of the benchmark
ROOT = Path(__file__).parents[2]
NODES = ("nvidia[0-9]*", "dxg")  #: of GPUs, below /dev; the second is WSL's
NO_GPU = "no GPU here (/dev/nvidia*): this needs a host, or a container started with --gpus, that has one"
SAID_BYTES = 16 * 1024  #: of a step's output, its end, that a record keeps
CHECKS: Mapping[str, int] = {
    "names": 90, "start": 120, "architectures": 240, "failed-capture": 90, "memory": 180, "onnx": 120, "seeds": 90,
    "lost": 90,
}  #: of server.worker.engine.gpu_checks, and their limits in seconds  # fmt: skip

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@dataclass(frozen=True, slots=True)
class Step:
    """One process. It is skipped where the program `needs` is not installed."""

    name: str
    command: tuple[str, ...]
    limit_s: float
    needs: str = ""


@dataclass(frozen=True, slots=True)
class StepEnd:
    """How a step ended: `ok`, `failed`, `too long` or `skipped`, and the end of what it printed."""

    name: str
    outcome: str
    code: int | None
    seconds: float
    said: str


@app.command()
def main(
    dev: Annotated[Path, typer.Option(help="folder of device nodes", hidden=True)] = Path("/dev"), save: bool = True
) -> None:
    """Run all steps and print how each ended; the record is written unless `--no-save`."""
    if not any(any(dev.glob(pattern)) for pattern in NODES):
        sys.stderr.write(NO_GPU + "\n")
        raise typer.Exit(2)
    before = record.describe_machine()
    ends = [run_step(step) for step in list_steps()]
    if save:
        sys.stdout.write(f"record: {record.save_record('first_gpu', SEED, before, describe_ends(ends))}\n")
    raise typer.Exit(int(any(end.outcome in ("failed", "too long") for end in ends)))


def list_steps() -> Sequence[Step]:
    """The steps in order: what others rely on comes first."""
    python = (sys.executable, "-P", "-m")
    tests = (sys.executable, "-m", "pytest", "-q", "-p", "no:randomly", "-p", "no:cacheprovider", "tests/gpu")
    query = "index,name,uuid,driver_version,mig.mode.current,memory.total,compute_mode"
    return (
        Step("machine", ("nvidia-smi", f"--query-gpu={query}", "--format=csv"), 30, needs="nvidia-smi"),
        Step("torch", (sys.executable, "-P", "-m", "torch.utils.collect_env"), 90),
        *(
            Step(name, (*python, "server.worker.engine.gpu_checks", name), limit)
            for name, limit in CHECKS.items()
        ),
        Step("tests", tests, 400),
        Step("benchmark", (*python, "server.worker.engine.bench_gpu"), 300),
        Step(
            "compute-sanitizer",
            ("compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9", *tests, "-k", "move"),
            400,
            needs="compute-sanitizer",
        ),
    )  # fmt: skip


def run_step(step: Step) -> StepEnd:
    """Run one step and say how it ended. At its limit it is killed with all that it started."""
    if step.needs and shutil.which(step.needs) is None:
        return _tell(StepEnd(step.name, "skipped", None, 0.0, f"{step.needs} is not installed"))
    started = time.monotonic()
    process = subprocess.Popen(
        step.command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, start_new_session=True,
    )  # fmt: skip
    try:
        said, _ = process.communicate(timeout=step.limit_s)
        outcome = "failed" if process.returncode else "ok"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        said, _ = process.communicate()
        outcome = "too long"
    text = said[-SAID_BYTES:].decode(errors="replace")
    return _tell(StepEnd(step.name, outcome, process.returncode, round(time.monotonic() - started, 1), text))


def describe_ends(ends: Sequence[StepEnd]) -> Mapping[str, object]:
    """What the record has: the number of steps by outcome, and each step."""
    outcomes = [end.outcome for end in ends]
    return {"outcomes": {each: outcomes.count(each) for each in sorted(set(outcomes))}, "steps": [*map(asdict, ends)]}


def _tell(end: StepEnd) -> StepEnd:
    sys.stdout.write(f"== {end.name}: {end.outcome}, {end.seconds:g} s\n{end.said.rstrip()}\n")
    sys.stdout.flush()
    return end


if __name__ == "__main__":
    app()

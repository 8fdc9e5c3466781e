"""A child's life: confine itself, load the archive's handler, answer batches until the worker closes the channel."""

import faulthandler
import importlib
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn, Protocol

from server.code_messages import (
    MAX_ANSWER_BYTES,
    BatchAnswered,
    Batches,
    CodeAnswer,
    CodeRequest,
    HandlerLoaded,
    LoadFailed,
    frame,
    make_failure,
    shorten,
)
from server.worker.sandbox.inside import module_space
from server.worker.sandbox.inside.confinement import CpuAllowance, confine, keep_descriptors
from server.worker.sandbox.inside.handler_metrics import HandlerMetrics
from server.worker.sandbox.inside.partial_answers import SendPart
from server.worker.sandbox.inside.sagemaker_script import load_script
from server.worker.sandbox.inside.torchserve_handler import load_handler
from server.worker.sandbox.messages import ForkChild

PACKAGES = {"PIL": "pillow", "sklearn": "scikit-learn", "cv2": "opencv-python-headless", "yaml": "pyyaml"}
FAILED = 1  #: exit code of a child that could not load its handler


class LoadedHandler(Protocol):
    """An archive's code, loaded."""

    @property
    def loaded(self) -> HandlerLoaded:
        """How it wants its requests."""

    @property
    def metrics(self) -> HandlerMetrics:
        """What its code measures."""

    def connect(self, send: SendPart) -> None:
        """How parts of answers are sent while they are made."""

    def answer(self, requests: Sequence[CodeRequest]) -> list[CodeAnswer]:
        """As many answers as requests. Raises nothing but what ends the process."""


LOADERS: dict[str, Callable[[ForkChild, Path], LoadedHandler]] = {
    "torchserve": load_handler,
    "mms": load_handler,
    "sagemaker": load_script,
}


def run_child(
    asked: ForkChild, user: int | None, channel: int, output: int, *, use_landlock: bool, keep_reading: bool
) -> NoReturn:
    """Be the child, from the fork to the end of the process. `user`: whom it becomes; None keeps the template's."""
    try:
        worker = keep_descriptors(channel, output)
        _become_child(asked, user, worker, use_landlock=use_landlock, keep_reading=keep_reading)
    except BaseException:  # nothing may return to the template's loop
        traceback.print_exc()
    finally:
        os._exit(FAILED)


def _become_child(
    asked: ForkChild, user: int | None, worker: socket.socket, *, use_landlock: bool, keep_reading: bool
) -> None:
    folder = Path(asked.folder)
    _say_where_it_ends()
    try:
        confine(folder, asked.limits, user, use_landlock=use_landlock, keep_reading=keep_reading)
        module_space.enter(folder / "model", asked.entry.folder, asked.packages)
        _set_threads(asked.threads)
        handler = LOADERS[asked.entry.style](asked, folder / "model")
    except BaseException as error:  # SystemExit of a module too
        traceback.print_exc()
        worker.sendall(frame(LoadFailed(shorten(explain(error, folder / "model")), isinstance(error, MemoryError))))
        _end(FAILED)
    handler.connect(lambda part: worker.sendall(frame(part)))
    worker.sendall(frame(handler.loaded))
    batches, allowance = Batches(worker), CpuAllowance(asked.limits.cpu_s)
    while (batch := batches.take()) is not None:
        allowance.renew()
        answers = handler.answer(batch.requests)
        sys.stdout.flush()
        sys.stderr.flush()
        worker.sendall(frame(BatchAnswered(refuse_large(answers), handler.metrics.take())))
    _end(0)


def explain(error: BaseException, model_dir: Path) -> str:
    """The error as one line: its type, what it says, where in the archive it was raised, and what may mend it.

    Where the archive's code has called other code that raised it, both places are said.
    """
    frames = traceback.extract_tb(error.__traceback__)
    ours = (str(Path(__file__).parent), str(Path(importlib.__file__).parent), "<frozen ")
    theirs = [each for each in frames if not each.filename.startswith(ours)]
    own = [each for each in theirs if Path(each.filename).is_relative_to(model_dir)]
    places = [own[-1], theirs[-1]] if own and own[-1] is not theirs[-1] else theirs[-1:]
    where = ", raised in ".join(_name_place(each, model_dir) for each in places)
    return f"{type(error).__name__}: {error}{f' ({where})' if where else ''}{_advise(error)}"


def _name_place(place: traceback.FrameSummary, model_dir: Path) -> str:
    """For example `handler.py, line 3`; of a file of the archive its path in it."""
    file = Path(place.filename)
    name = file.relative_to(model_dir) if file.is_relative_to(model_dir) else file.name
    return f"{name}, line {place.lineno}"


def _advise(error: BaseException) -> str:
    """What to do about a module that is missing: it can be of the archive itself, if its name says nothing else."""
    if not isinstance(error, ModuleNotFoundError) or not error.name:
        return ""
    name = error.name.partition(".")[0]
    return f"; pip install {PACKAGES.get(name, name)} beside the server, or pack the module into the archive"


def refuse_large(answers: list[CodeAnswer]) -> list[CodeAnswer]:
    """The answers, or refusals where together they are more than a message may hold."""
    size = len(answers[0].body) if len(answers) == 1 else sum(len(answer.body) for answer in answers)
    if size < MAX_ANSWER_BYTES - 64 * 1024 * len(answers):
        return answers
    message = f"the answers of a batch have {size} bytes, {MAX_ANSWER_BYTES} are allowed"
    return [make_failure(503, message) for _ in answers]


def _say_where_it_ends() -> None:
    """Have the lines of code in the log at which the process crashes, or is ended for the time that it takes."""
    faulthandler.enable(file=2)
    faulthandler.register(signal.SIGXCPU, file=2, chain=True)


def _set_threads(threads: int) -> None:
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(threads)


def _end(code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

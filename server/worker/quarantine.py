"""Models that this worker refuses to run, and the note of those that it is running now.

The supervisor keeps the quarantine of the whole server: it survives workers and ends when an operator releases a model.
A model gets there when a run of it overran, or when workers died twice while it ran.
"""

import mmap
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from model_store.errors import LoadError
from model_store.names import ModelName
from server.contract import RUNNING_BYTES


class ModelQuarantined(LoadError):
    """The model was a danger to others; an operator has to release it."""

    reason = "quarantined"

    def __init__(self, model: str, why: str) -> None:
        super().__init__(f"{model} is quarantined: {why}; an operator can release it: POST /fleet/release/{model}")


class Quarantine:
    """Reasons by model. `report` tells the supervisor of a new one."""

    def __init__(self, report: Callable[[ModelName, str], object]) -> None:
        self.report = report
        self.reasons: dict[str, str] = {}

    def __repr__(self) -> str:
        """For example `<Quarantine 2 models>`."""
        return f"<Quarantine {len(self.reasons)} models>"

    def error(self, model: ModelName) -> ModelQuarantined:
        """Why a model of `reasons` is not run."""
        return ModelQuarantined(model, self.reasons[model])

    def add(self, model: ModelName, why: str) -> None:
        """Refuse the model from now on, and report it."""
        if model not in self.reasons:
            self.reasons[model] = why
            self.report(model, why)

    def replace(self, reasons: Mapping[str, str]) -> None:
        """Take the supervisor's quarantine for this worker's."""
        self.reasons = dict(reasons)


class Running:
    """The names of models that are being run, in a file: what it holds when this process dies may have killed it."""

    def __init__(self, path: str) -> None:
        with open(path, "xb+") as file:  # noqa: PTH123 -- once
            file.truncate(RUNNING_BYTES)
            self._memory = mmap.mmap(file.fileno(), RUNNING_BYTES)
        self._models: Counter[str] = Counter()

    def __repr__(self) -> str:
        """For example `<Running 1 models>`."""
        return f"<Running {len(self._models)} models>"

    def begin(self, model: ModelName) -> None:
        """The model runs from now on."""
        self._models[model] += 1
        self._write()

    def end(self, model: ModelName) -> None:
        """One run of the model has ended."""
        self._models[model] -= 1
        if self._models[model] <= 0:
            del self._models[model]
        self._write()

    @contextmanager
    def noting(self, model: ModelName) -> Iterator[None]:
        """The model runs inside."""
        self.begin(model)
        try:
            yield
        finally:
            self.end(model)

    def _write(self) -> None:
        names = "\n".join(self._models).encode()[: RUNNING_BYTES - 1]
        self._memory[: len(names) + 1] = names + b"\0"

"""Models that this worker refuses to run.

The supervisor keeps the quarantine of the whole server: it survives workers and ends when an operator releases a model.
A model gets there when a run of it overran, or when workers died twice while it ran.
"""

from collections.abc import Callable, Mapping

from model_store.errors import LoadError
from model_store.names import ModelName
from server.errors import describe_quarantine


class ModelQuarantined(LoadError):
    """The model was a danger to others; an operator has to release it."""

    reason = "quarantined"

    def __init__(self, model: str, why: str) -> None:
        super().__init__(describe_quarantine(model, why))


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

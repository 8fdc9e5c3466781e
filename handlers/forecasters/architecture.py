"""The record that describes an architecture completely. Each network file ends with its own, named `ARCHITECTURE`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from handlers.architectures import SUMMARIES
from handlers.base import Family
from handlers.forecasters.training_forward import TrainingForward, run_one_by_one

#: gradient: AdamW on the pinball loss; dense: the same for dense networks, with dropout and a gradient of their own;
#: lasso: L1-penalised quantile regression; parts: each part by its own method
FitMethod = Literal["gradient", "dense", "lasso", "parts"]


def read_whole_context(family: Family) -> int:
    """Return the reach of a network whose answer depends on its whole context."""
    return family.input_shape[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """One architecture: how its archives are read, which inputs `fleetcast train` gives it, and how it is trained.

    Functions of a family take one that `family` made, never an ensemble.
    """

    name: str  #: the name in `fleetcast.json`, on the command line, and of its file
    config: type[msgspec.Struct]  #: the type that validates the `config` of an archive
    family: Callable[[str, Any], Family]  #: makes the family of (key, config)
    #: The last steps of the context that can change the answer; what lies before them is added as lagged channels.
    reach: Callable[[Any], int] = read_whole_context
    #: The context that a config is made for, in steps; None if the frequency determines it.
    context: Callable[[Any], int] | None = None
    #: Its calendar is a channel for each weekday, and it forecasts whole days from midnight unless told otherwise.
    whole_days: bool = False
    #: It answers sample paths instead of quantiles, from a seed in its last channel; its reference called with targets
    #: gives their negative log-likelihood, the loss of its training. Such an architecture makes no ensembles.
    samples: bool = False
    training_forward: Callable[[Any], TrainingForward] = run_one_by_one
    fit: FitMethod = "gradient"

    @property
    def summary(self) -> str:
        """The description of the architecture in one line."""
        return SUMMARIES[self.name]

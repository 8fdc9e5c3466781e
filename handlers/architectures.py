"""The names of the architectures and a line about each, for help texts, error messages and the reference.

This module imports no torch, so that a command line can list them. Everything else about an architecture is the
record `ARCHITECTURE` in its own file, `handlers/forecasters/NAME.py`.
"""

from collections.abc import Mapping
from types import MappingProxyType

#: An architecture has a file and a line here; `handlers.forecasters` imports the file by the name.
SUMMARIES: Mapping[str, str] = MappingProxyType(
    {
        "tcn": "a dilated causal CNN, the default for other steps",
        "mlp": "two hidden layers over the whole context",
        "gru": "a recurrence, then all steps at once",
        "seq2seq": "a recurrence for the past, another for the steps ahead",
        "lear": "the linear model of power prices, fitted in seconds, the default for days",
        "ddnn": "two dense layers over what lear reads, fitted in seconds; a good part of a mixture",
        "mqcnn": "a dilated causal CNN, then a context for each step",
        "mqrnn": "a recurrence, then a context for each step",
        "deepar": "a recurrence that reads its own draws: sample paths",
        "deepstate": "a state space model led by a recurrence: sample paths",
        "esrnn": "exponential smoothing, then a recurrence for the rest",
        "mixture": "several architectures in one archive: the weighted mean of their quantiles",
        "recursive": "a recurrence that reads its own median of each step",
    }
)

"""A retrained archive keeps its tail rule and its rules for histories, learnt anew from the newer prices."""

from datetime import timedelta

import numpy as np
from msgspec import UNSET
from msgspec.structs import replace

from handlers.training.history_rules import learn_history_rules
from handlers.training.time_series import Series
from model_store.archives.manifest import Tails
from server.offline.refits import refit_scalers
from server.offline.retraining import rebuild_forecast
from tests.server.markets import START, make_forecast

TAILS = Tails(low=0.3, high=0.4, band=(0.1, 0.9))


def make_series(scale: float) -> Series:
    """Sixty days with a course of the day, around `scale`."""
    hours = np.arange(24 * 60)
    noise = np.random.default_rng(1).normal(0, 0.1, len(hours))
    values = scale * (3 + np.sin(hours % 24 / 12 * np.pi) + noise)
    return Series("M00", START, timedelta(hours=1), values, np.empty((0, len(hours))))


def test_rules_are_learnt_anew_and_options_are_kept() -> None:
    """The range follows the prices; share, fill and fallback are the archive's. Another architecture keeps them too."""
    old, new = make_series(10), make_series(100)
    plain = make_forecast(tail="exponential", tails=TAILS, context_length=96)
    rules = learn_history_rules(old, old.values, plain, 0.4, fallback=True)
    ruled = replace(plain, history=replace(rules, fill="last"))
    found = refit_scalers(ruled, new)
    assert found.history
    assert rules.high < 100 < found.history.high
    assert (found.history.max_missing, found.history.fill, bool(found.history.fallback)) == (0.4, "last", True)
    assert found.tails == TAILS, "the fit learns them"
    other = rebuild_forecast(ruled, new, "gru", {})
    assert other.history
    assert (other.tail, other.history.max_missing, bool(other.history.fallback)) == ("exponential", 0.4, True)


def test_archives_of_before_get_no_rules() -> None:
    """Neither tails nor rules for histories are added to an archive that has none."""
    series = make_series(1)
    for made in (refit_scalers(make_forecast(), series), rebuild_forecast(make_forecast(), series, "gru", {})):
        assert (made.tail, made.tails, made.history) == ("clamp", UNSET, UNSET)

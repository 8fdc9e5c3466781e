"""The drift test: it alarms as seldom as it says where days are alike, and soon where losses grow."""

import numpy as np

from server.bands.drift import FALSE_ALARM_DAYS, LEAST_DAYS, MOST_DAYS, Drift


def test_false_alarms_are_as_rare_as_promised() -> None:
    """300 markets of a year of exchangeable days: at most one false alarm in FALSE_ALARM_DAYS of them on average."""
    rng = np.random.default_rng(5)
    days, markets, alarms = 364, 300, 0
    for _ in range(markets):
        drift = Drift()
        alarms += sum(drift.judge(day, loss) for day, loss in enumerate(rng.lognormal(size=days).tolist()))
    assert alarms <= days * markets / FALSE_ALARM_DAYS


def test_doubled_losses_raise_an_alarm() -> None:
    """Losses twice as large as in the 60 days before are found within three weeks, with the day of the alarm."""
    rng, drift = np.random.default_rng(6), Drift()
    for day in range(60):
        assert not drift.judge(day, float(rng.lognormal(0, 0.4)))
    found = [day for day in range(60, 90) if drift.judge(day, float(2.5 * rng.lognormal(0, 0.4)))]
    assert found
    assert found[0] < 81
    assert drift.alarms == 1
    assert drift.since == found[0]


def test_the_first_days_are_not_judged_and_the_last_ones_are_kept() -> None:
    """Nothing is worse than nothing; and what is kept is bounded."""
    drift = Drift()
    assert not any(drift.judge(day, float(day)) for day in range(LEAST_DAYS))
    for day in range(2 * MOST_DAYS):
        drift.judge(day, 0.0)
    assert len(drift.days) == len(drift.ranked) == MOST_DAYS

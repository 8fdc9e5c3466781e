"""Rolling windows: their places, that none uses its own future, and the errors for archives that do not fit."""

from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from handlers.training.time_series import Series, read_csv
from server.offline.rolling_windows import (
    ROWS,
    InProcess,
    Rolling,
    Unfit,
    add_known_series,
    explain_unused_rows,
    forecast_windows,
)
from tests.server.markets import HISTORY, HORIZON, START, make_forecast, open_market, pack_market, write_prices

KNOWN = ("load_M00",)


@pytest.fixture(scope="module")
def series(tmp_path_factory: pytest.TempPathFactory) -> Series:
    """One market with its load forecast."""
    csv = write_prices(tmp_path_factory.mktemp("data") / "prices.csv", ["M00"])
    columns = {each.name: each for each in read_csv(csv, "hour", ["M00", *KNOWN])}
    return add_known_series(columns, "M00", make_forecast(dynamic_feat=KNOWN))


def make_hours(count: int) -> Series:
    """A series of so many hours."""
    return Series("x", START, timedelta(hours=1), np.zeros(count), np.empty((0, count)))


def test_windows_are_counted_from_the_end_or_from_a_moment() -> None:
    """Back from the end they leave a rest at the beginning, from a moment on one at the end; `most` keeps the last."""
    assert Rolling().origins(make_hours(50), [make_forecast()]).tolist() == [26, 32, 38, 44]
    assert Rolling(most=2).origins(make_hours(50), [make_forecast()]).tolist() == [38, 44]
    assert Rolling(every=1, most=3).origins(make_hours(50), [make_forecast()]).tolist() == [42, 43, 44]
    noon = datetime.fromisoformat("2024-03-05 12:00")
    assert Rolling(first=noon).origins(make_hours(50), [make_forecast()]).tolist() == [36, 42]
    assert Rolling(first=START).origins(make_hours(50), [make_forecast()]).tolist() == [24, 30, 36, 42]
    assert Rolling(until=noon).origins(make_hours(50), [make_forecast()]).tolist() == [24, 30]


@given(st.integers(0, 80), st.integers(1, 30), st.integers(1, 9), st.integers(0, 7), st.integers(0, 60), st.booleans())
def test_windows_always_have_their_history_and_their_actuals(
    steps: int, history: int, horizon: int, every: int, first: int, given_first: bool
) -> None:
    """Whatever is asked: every window lies within the series, evenly apart; or there is none and Unfit says so."""
    moment = START + first * timedelta(hours=1) if given_first else None
    asked = make_forecast(context_length=history, prediction_length=horizon)
    try:
        found = Rolling(every=every, first=moment).origins(make_hours(steps), [asked])
    except Unfit:
        counted = range(first, steps, every or horizon) if given_first else range(steps)
        assert not any(origin >= history and origin + horizon <= steps for origin in counted)
        return
    assert found[0] >= max(history, first if given_first else 0)
    assert found[-1] + horizon <= steps
    assert set(np.diff(found)) <= {every or horizon}


@given(st.integers(0, 23), st.integers(1, 150), st.integers(0, 30), st.integers(0, 40))
def test_windows_of_an_origin_start_at_its_time_of_day(begin: int, steps: int, every: int, most: int) -> None:
    """Wherever in a day the file begins and ends, the last possible windows are taken, at least `every` steps apart."""
    series = replace(make_hours(steps), start=START + timedelta(hours=begin))
    asked = make_forecast(origin="06:00")
    possible = [at for at in range(HISTORY, steps - HORIZON + 1) if (begin + at) % 24 == 6]
    try:
        found = Rolling(every=every, most=most).origins(series, [asked]).tolist()
    except Unfit:
        assert not possible
        return
    assert found[-1] == possible[-1]
    assert set(found) <= set(possible)
    assert set(np.diff(found).tolist()) <= {24 if every <= 24 else 48}
    left = steps - HORIZON - found[-1]
    assert explain_unused_rows(series, asked, found[-1] + HORIZON - 1).endswith("not used") == (left > 0)


def test_windows_of_several_archives_start_where_all_may() -> None:
    """One that forecasts at any time follows one that does not; two times of day have no window in common."""
    three = [make_forecast(), make_forecast(origin="12:00"), make_forecast(origin="12:00", context_length=30)]
    assert Rolling().origins(make_hours(100), three).tolist() == [36, 60, 84]
    with pytest.raises(Unfit, match="24 of history and 6 to forecast, from 12:00 on"):
        Rolling().origins(make_hours(40), three[1:2])
    with pytest.raises(Unfit, match="one archive forecasts from 00:00 on and another from 12:00"):
        Rolling().origins(make_hours(100), [*three, make_forecast(origin="00:00")])


def test_no_forecast_knows_what_comes_after_its_origin(series: Series) -> None:
    """With every price from the origin on, and every covariate beyond the horizon, replaced, it is the same."""
    own = open_market(dynamic_feat=KNOWN)
    origins = Rolling(most=5).origins(series, [make_forecast()])
    whole = forecast_windows(InProcess(), own, series, origins)
    for i, origin in enumerate(origins.tolist()):
        values, known = series.values.copy(), series.known.copy()
        values[origin:], known[:, origin + HORIZON :] = 1e4, -1e4
        spoilt = forecast_windows(InProcess(), own, replace(series, values=values, known=known), origins[i : i + 1])
        np.testing.assert_array_equal(spoilt.quantiles[0], whole.quantiles[i])


def test_what_is_known_ahead_is_seen(series: Series) -> None:
    """A covariate of the forecast steps changes the forecast, and so does the last price."""
    own = open_market(dynamic_feat=KNOWN)
    origins = Rolling(most=1).origins(series, [make_forecast()])
    whole = forecast_windows(InProcess(), own, series, origins).quantiles
    known, values = series.known.copy(), series.values.copy()
    known[0, -1] *= 2
    values[origins[0] - 1] += 100
    assert (forecast_windows(InProcess(), own, replace(series, known=known), origins).quantiles != whole).any()
    assert (forecast_windows(InProcess(), own, replace(series, values=values), origins).quantiles != whole).any()


def test_windows_are_answered_alike_however_many_there_are(series: Series) -> None:
    """More windows than one request takes: each is what it is alone, and all are told of."""
    own, told = open_market(dynamic_feat=KNOWN), list[int]()
    origins = Rolling(every=1, most=ROWS + 9).origins(series, [make_forecast()])
    many = forecast_windows(InProcess(), own, series, origins, told.append)
    assert told == [ROWS, 9]
    for at in (0, ROWS - 1, ROWS, ROWS + 8):
        alone = forecast_windows(InProcess(), own, series, origins[at : at + 1])
        np.testing.assert_allclose(many.quantiles[at], alone.quantiles[0], rtol=1e-5)


def test_a_cut_keeps_steps_and_levels(series: Series) -> None:
    """The first steps, at the levels that are asked for."""
    origins = Rolling(most=3).origins(series, [make_forecast()])
    whole = forecast_windows(InProcess(), open_market(dynamic_feat=KNOWN), series, origins)
    cut = whole.cut(4, np.array([0.1, 0.9]))
    assert cut.levels.tolist() == [0.1, 0.9]
    np.testing.assert_array_equal(cut.quantiles, whole.quantiles[:, :4, [0, 2]])
    assert cut.actuals.shape == (3, 4)


def test_what_does_not_fit_is_said(series: Series) -> None:
    """In the words of file and archive: a gap in a covariate, another frequency, too short a series, no forecast."""
    own, ask = open_market(dynamic_feat=KNOWN), InProcess()
    origins = Rolling(most=2).origins(series, [make_forecast()])
    gap = series.known.copy()
    gap[0, -1] = np.nan
    with pytest.raises(Unfit, match=r"column 'load_M00' at 2024-03-23 23:00:00: a known-future value is missing"):
        forecast_windows(ask, own, replace(series, known=gap), origins)
    with pytest.raises(Unfit, match=r"m.mar forecasts steps of 30min, but M00 has 1h"):
        forecast_windows(ask, open_market(frequency="30min", dynamic_feat=KNOWN), series, origins)
    with pytest.raises(Unfit, match=r"x has 29 steps .* a window needs 24 of history and 6 to forecast"):
        Rolling().origins(make_hours(29), [make_forecast()])
    with pytest.raises(Unfit, match=r"m.mar wants `cat` \(zone\)"):
        _ = open_market(cat=("zone",)).forecast


def test_a_model_says_what_it_is(tmp_path: Path) -> None:
    """Its repr names archive and version."""
    assert repr(open_market()) == "<ArchiveVersion m.mar not stored>"
    assert pack_market(1) != pack_market(2)

"""Writes `scores.json`, what `test_scores.py` expects, with the packages whose definitions ours have to meet.

    pip install fev==0.10.0 scoringrules==0.10.0 && python -m tests.handlers.evaluation.make_scores

They are no dependencies of the tests: `fev` brings half of a data stack along. Numbers here come from them alone, or
from loops that are written as the definition is, never from `handlers.evaluation.scores`.
"""

import json
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np

START, DAYS, FIRST_DAY, HORIZON = "2024-03-01", 24, 14, 24
LEVELS = [0.1, 0.25, 0.5, 0.75, 0.9]
MEMBERS = 5000  #: of the ensemble that stands for a piecewise linear quantile function
MONDAY, SATURDAY = 0, 5


def make_prices() -> dict[str, Any]:
    """Hourly prices with missing values and zeros, and quantile forecasts of ten days in a row."""
    rng = np.random.default_rng(20240301)
    hours = np.arange(24 * DAYS)
    values = np.round(40 + 25 * np.sin(hours / 24 * 2 * np.pi) + rng.normal(0, 15, len(hours)), 2)
    values[rng.random(len(hours)) < 0.04] = np.nan
    values[rng.random(len(hours)) < 0.04] = 0.0
    origins = 24 * np.arange(FIRST_DAY, DAYS)
    centers = np.nan_to_num(values, nan=40.0)[origins[:, None] + np.arange(HORIZON)] + rng.normal(0, 12, (10, HORIZON))
    quantiles = np.round(np.sort(centers[..., None] + rng.normal(0, 14, (10, HORIZON, len(LEVELS)))), 2)
    quantiles[3, :4] = quantiles[3, :4, 2:3]  # a forecast that is sure: all quantiles are equal
    return {"values": values, "origins": origins, "quantiles": quantiles}


def forecast_naively(values: Any, origins: Any) -> Any:
    """A week before on Saturday, Sunday and Monday, else a day before: `epftoolbox`'s default."""
    start, found = datetime.fromisoformat(START), []
    for origin in origins:
        for hour in range(origin, origin + HORIZON):
            weekday = (start + timedelta(hours=int(hour))).weekday()
            found.append(values[hour - (168 if weekday in (MONDAY, SATURDAY, SATURDAY + 1) else 24)])
    return np.array(found).reshape(len(origins), HORIZON)


def compute_expected(values: Any, origins: Any, quantiles: Any) -> dict[str, float]:
    """The scores by `fev` and `scoringrules`."""
    import fev.metrics as fev  # type: ignore[import-not-found, unused-ignore] # noqa: PLC0415
    import scoringrules as sr  # type: ignore[import-not-found, import-untyped, unused-ignore] # noqa: PLC0415

    y = values[origins[:, None] + np.arange(HORIZON)]
    given = {
        "y_true": y[..., None],
        "y_pred": quantiles[:, :, 2:3],
        "y_past": np.concatenate([values[:origin] for origin in origins])[:, None],
        "y_past_lengths": origins,
        "q_pred": quantiles[:, :, None],
        "seasonality": 24,
        "quantile_levels": LEVELS,
    }
    known = ~np.isnan(y)
    members = (np.arange(MEMBERS) + 0.5) / MEMBERS
    drawn = np.array([np.interp(members, LEVELS, each) for each in quantiles[known]])
    before = forecast_naively(values, origins)
    both = ~np.isnan(before - y)
    losses = [sr.quantile_score(y[known], quantiles[known][:, i], level).mean() for i, level in enumerate(LEVELS)]
    found = {
        "pinball": np.mean(losses),
        "wql": fev.WQL().compute(**given),
        "wape": fev.WAPE().compute(**given),
        "mase": fev.MASE().compute(**given),
        "rmae": np.abs(y - quantiles[:, :, 2])[both].mean() / np.abs(y - before)[both].mean(),
        "crps": sr.crps_ensemble(y[known], drawn).mean(),
        "twice_pinball": sr.crps_quantile(y[known], quantiles[known], np.array(LEVELS)).mean(),
        "coverage": np.mean(
            [each[0] <= seen <= each[-1] for seen, each in zip(y[known], quantiles[known], strict=True)]
        ),
    }
    return {name: float(value) for name, value in found.items()}


def main() -> None:
    """Write the file."""
    data = make_prices()
    scores = compute_expected(**data)
    lists = {name: np.array(np.where(np.isnan(array), None, array)).tolist() for name, array in data.items()}
    out = Path(__file__).with_name("scores.json")
    out.write_text(json.dumps({"start": START, "levels": LEVELS, "expected": scores, **lists}) + "\n")


if __name__ == "__main__":
    main()

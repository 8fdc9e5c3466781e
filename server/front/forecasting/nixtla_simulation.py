"""Sample paths as Nixtla's client asks for them (CONTRACTS 10): who can draw them, and how they lie end to end.

A path is one possible course of all steps, so that it takes a model that knows how steps go together: an archive whose
network draws paths, or a correlation archive. The samples that others give are independent from step to step.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import msgspec

from server.errors import Refused, Situation
from server.front.fan_out import Joint
from server.front.forecasting.bodies import require_few
from server.front.forecasting.calls import Described, Forecast, ForecastCall, require_forecasts
from server.front.forecasting.nixtla_series import NixtlaRequest, Plan
from server.front.slices import ITEM, Pacer

MOST_SEED = 2**53 - 1  #: of ours; the client's is any number of 64 bits


class NoPaths(Exception):
    """The model gives quantiles of each step, and does not know how steps go together."""

    def __init__(self, model: str) -> None:
        super().__init__(
            f"{model} gives quantiles of each step and not how steps go together: pass the name of a correlation "
            "archive as model (`fleetcast correlate` makes one, which takes a series for each of its models), or of an "
            "archive that draws paths (`fleetcast train --architecture deepar`)"
        )


async def simulate_paths(
    call: ForecastCall, asked: NixtlaRequest, described: Described, plan: Plan
) -> Mapping[str, Any]:
    """The answer: paths of every series. Raises NoPaths, Refused, ClientGone."""
    paths = described.recipe.paths
    require_few(asked.n_paths * sum(plan.list_sizes()), "the answer")
    if described.takers is not None:
        found = await _draw_jointly(call, asked, described, plan)
    elif not paths:
        raise NoPaths(described.model)
    elif asked.n_paths > paths:
        message = f"the network of {described.model} draws {paths} paths, so at most so many can be asked"
        raise Refused(Situation.BAD_REQUEST, message, field="n_paths")
    else:
        found = await _draw_apart(call, asked, plan)
    samples, pacer = list[float](), Pacer()
    for path in range(asked.n_paths):
        samples += plan.lay_out(found, partial(_take, path))
        await pacer.spend(ITEM * len(found))
    coupled = described.takers is not None
    return {"samples": samples, "sizes": plan.list_sizes(), "n_paths": asked.n_paths, "h": asked.h, "coupled": coupled}


async def _draw_jointly(
    call: ForecastCall, asked: NixtlaRequest, described: Described, plan: Plan
) -> Sequence[Forecast]:
    """Path s is the same scenario in every series."""
    drawn = {"num_samples": asked.n_paths, **({} if asked.seed is None else {"seed": asked.seed & MOST_SEED})}
    raw = {name: msgspec.Raw(msgspec.json.encode(value)) for name, value in drawn.items()}
    joint = Joint(described.model, raw)
    return require_forecasts(await call.forecast(list(plan.list_instances()), {"output_types": ["marginal"]}, joint))


async def _draw_apart(call: ForecastCall, asked: NixtlaRequest, plan: Plan) -> Sequence[Forecast]:
    """Each series by itself. INVARIANT: two series never share a seed, or their noise would be the same."""
    instances = list(plan.list_instances())
    wanted = {"output_types": ["samples"], "num_samples": asked.n_paths}
    if asked.seed is None:
        return require_forecasts(await call.forecast(instances, wanted))
    found = list[Forecast | Refused]()
    for i, instance in enumerate(instances):
        found += await call.forecast([instance], {**wanted, "seed": (asked.seed + i) & MOST_SEED})
    return require_forecasts(found)


def _take(path: int, forecast: Forecast) -> list[Any] | None:
    return None if forecast.samples is None or path >= len(forecast.samples) else forecast.samples[path]

"""What archives must share so that their forecasts can be computed as arrays over all of them. No torch.

Numbers that differ from archive to archive (scalers, floor and cap, calibration) are arrays; all else is one recipe.
"""

from threading import Lock
from weakref import WeakValueDictionary

from model_store.archives.manifest import ForecastSpec


class SharedRecipe:
    """One recipe. INVARIANT: two archives share it if and only if they have the same object."""

    __slots__ = ("__weakref__", "key")

    def __init__(self, key: object) -> None:
        self.key = key

    def __repr__(self) -> str:
        return f"<SharedRecipe {self.key}>"


_known: WeakValueDictionary[object, SharedRecipe] = WeakValueDictionary()
_lock = Lock()  # archives are loaded on several threads


def find_shared_recipe(forecast: ForecastSpec) -> SharedRecipe | None:
    """Find the recipe of an archive; None for one whose forecasts are computed one by one.

    Those are archives of several products, of sample paths, of deviations from a covariate, and with a seed channel.
    """
    channels = forecast.inputs
    if len(forecast.products) > 1 or forecast.paths or forecast.residual_to:
        return None
    if any(channel.source == "seed" for channel in channels):
        return None
    rules = forecast.history
    key = (
        tuple((each.source, each.lag, each.shift, each.index, each.feature, each.scaler.kind) for each in channels),
        (forecast.frequency, forecast.origin, forecast.context_length, forecast.prediction_length),
        (forecast.pad_context, forecast.scaler.kind, tuple(forecast.trained_levels), tuple(forecast.quantile_levels)),
        (forecast.dynamic_feat, forecast.cat),
        (rules.flat_steps, rules.stale_steps, bool(rules.profile)) if rules else None,
    )
    with _lock:
        found = _known.get(key)
        if found is None:
            found = _known[key] = SharedRecipe(key)
        return found

"""The network architectures that a forecaster archive can name, one file each, and the making of families.

`ARCHITECTURES` is the registry: a record for each name in `handlers.architectures.SUMMARIES`.
"""

import threading
from collections.abc import Mapping
from hashlib import sha256
from importlib import import_module
from types import MappingProxyType
from typing import Annotated
from weakref import WeakValueDictionary

import msgspec
import numpy as np
import torch
from msgspec import Meta

from handlers.architectures import SUMMARIES
from handlers.base import Family, Float32
from handlers.forecasters.architecture import Architecture
from handlers.forecasters.ensemble import MOST_MEMBERS, Ensemble
from model_store.archives.manifest import FLEETCAST_JSON, ForecastSpec, Spec
from model_store.errors import ArchiveInvalid


def _load_record(name: str) -> Architecture:
    """Load the record of `handlers/forecasters/NAME.py`."""
    record = import_module(f"handlers.forecasters.{name}").ARCHITECTURE
    assert isinstance(record, Architecture), f"{name}.py: ARCHITECTURE is no Architecture"
    assert record.name == name, f"{name}.py: its record is called {record.name!r}"
    return record


ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType({name: _load_record(name) for name in SUMMARIES})


def get_family(spec: Spec) -> Family:
    """Return the family of a forecaster archive: the same object for equal architecture and config.

    Raises:
        ArchiveInvalid: an unknown architecture, a wrong config field, or a `forecast` that does not fit the network.
    """
    found = build_family(spec.architecture, spec.config)
    if spec.forecast is not None:
        check_forecast(found, spec.forecast)
    return found


def build_family(architecture: str, config: Mapping[str, object]) -> Family:
    """Build the family by name and (partial) config; missing fields have defaults. Raises as `get_family` does.

    `members` in the config of any architecture of quantiles makes an ensemble of it.
    """
    known = ARCHITECTURES.get(architecture)
    if known is None:
        names = ", ".join(ARCHITECTURES)
        raise ArchiveInvalid(f"{FLEETCAST_JSON}: unknown architecture {architecture!r}; known are {names}")
    fields = dict(config)
    try:
        members = msgspec.convert(fields.pop("members", 1), Annotated[int, Meta(ge=1, le=MOST_MEMBERS)])
    except msgspec.ValidationError as error:
        raise ArchiveInvalid(f"{FLEETCAST_JSON}: config of {architecture}: {error} - at `$.members`") from error
    try:
        record = msgspec.convert(fields, known.config)
    except msgspec.ValidationError as error:
        raise ArchiveInvalid(f"{FLEETCAST_JSON}: config of {architecture}: {error}") from error
    return _build_family(architecture, record, members)


def random_tensors(family: Family, seed: int) -> dict[str, Float32]:
    """Make a state dict by the initialisation of the reference, equal for equal seeds. For demos and tests."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        state = family.reference().state_dict()
    return {name: tensor.numpy().astype(np.float32) for name, tensor in state.items()}


def split_members(family: Family) -> tuple[Family, int]:
    """Return the family of the members of an ensemble and their number; for any other family, itself and 1."""
    return (family.member, family.members) if isinstance(family, Ensemble) else (family, 1)


def find_architecture(family: Family) -> Architecture:
    """Return the record of a family that `build_family` made, for an ensemble that of its members.

    Raises KeyError for other families.
    """
    return ARCHITECTURES[_name_in_key(family)]


def answers_paths(family: Family) -> bool:
    """Return whether the family answers sample paths instead of quantiles, which a graph never does."""
    record = ARCHITECTURES.get(_name_in_key(family))
    return record is not None and record.samples


def _name_in_key(family: Family) -> str:
    """Return the name in a key. INVARIANT: `_build_family` makes keys of the form NAME-DIGEST."""
    member, _ = split_members(family)
    return member.key.rpartition("-")[0]


_families: "WeakValueDictionary[tuple[str, msgspec.Struct, int], Family]" = WeakValueDictionary()
_building = threading.RLock()  # reentrant: an ensemble builds its members' family


def _build_family(architecture: str, config: msgspec.Struct, members: int) -> Family:
    """Build the family, or return the same object for equal arguments while it is in use.

    The author of an archive chooses the config, so that families without models must not stay in memory.
    """
    key = (architecture, config, members)
    with _building:
        family = _families.get(key)
        if family is None:
            family = _families[key] = _make(architecture, config, members)
    return family


def _make(architecture: str, config: msgspec.Struct, members: int) -> Family:
    if members > 1:
        if ARCHITECTURES[architecture].samples:
            what = "the mean of paths is no path; train more of them"
            raise ArchiveInvalid(f"{FLEETCAST_JSON}: config of {architecture}: {what} - at `$.members`")
        return Ensemble(_build_family(architecture, config, 1), members)
    digest = sha256(msgspec.json.encode(config, order="sorted")).hexdigest()[:16]
    return ARCHITECTURES[architecture].family(f"{architecture}-{digest}", config)


def check_forecast(family: Family, forecast: ForecastSpec) -> None:
    """Check that the forecast fits inputs and outputs of the network. Raises ArchiveInvalid that names the field."""
    products, output = len(forecast.products), family.output_shape
    if products > 1 and output[1:-1] == (products,):
        output = (output[0], products * output[-1])
    if len(family.input_shape) != 2 or len(output) != 2:  # noqa: PLR2004 -- as the message says
        shapes = f"{list(family.input_shape)} -> {list(family.output_shape)}"
        wanted = f"[features, context] -> [prediction, {f'{products}, ' if products > 1 else ''}quantiles]"
        raise ArchiveInvalid(f"{FLEETCAST_JSON}: a forecast needs a network {wanted}, but {family.key} has {shapes}")
    (features, context), (prediction, quantiles) = family.input_shape, output
    last = "quantile_levels" + " times products" * (products > 1), len(forecast.quantile_levels) * products, quantiles
    if forecast.paths or answers_paths(family):
        last = "paths", forecast.paths or 0, quantiles
    for field, stated, network in (
        ("inputs", len(forecast.inputs), features),
        ("context_length", forecast.context_length, context),
        ("prediction_length", forecast.prediction_length, prediction),
        last,
    ):
        if stated != network:
            what = f"forecast.{field} says {stated}, but the network {family.key} has {network}"
            raise ArchiveInvalid(f"{FLEETCAST_JSON}: {what}")

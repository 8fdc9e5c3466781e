"""The network architectures a forecaster archive can name, one file each, and the way from its record to its family."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from types import MappingProxyType
from typing import Any

import msgspec
import numpy as np
import torch

from handlers.base import Family, Float32
from handlers.forecasters.gru import Gru, GruConfig
from handlers.forecasters.mlp import Mlp, MlpConfig
from handlers.forecasters.seq2seq import Seq2Seq, Seq2SeqConfig
from handlers.forecasters.tcn import Tcn, TcnConfig
from model_store.errors import ArchiveInvalid
from model_store.manifest import FLEETCAST_JSON, Forecast, Spec


@dataclass(frozen=True, slots=True)
class Architecture:
    """The record an archive's `config` is validated as, and what makes the family of (key, config)."""

    config: type[msgspec.Struct]
    family: Callable[[str, Any], Family]


ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {
        "gru": Architecture(GruConfig, Gru),
        "mlp": Architecture(MlpConfig, Mlp),
        "seq2seq": Architecture(Seq2SeqConfig, Seq2Seq),
        "tcn": Architecture(TcnConfig, Tcn),
    }
)


def family(spec: Spec) -> Family:
    """The family of a forecaster archive: the same object for equal architecture and config.

    Raises:
        ArchiveInvalid: an unknown architecture, a wrong config field, or a `forecast` that does not fit the network.
    """
    found = build(spec.architecture, spec.config)
    if spec.forecast is not None:
        check_forecast(found, spec.forecast)
    return found


def build(architecture: str, config: Mapping[str, object]) -> Family:
    """The family by name and (partial) config; fields left out have the architecture's defaults. Raises as `family`."""
    known = ARCHITECTURES.get(architecture)
    if known is None:
        names = ", ".join(ARCHITECTURES)
        raise ArchiveInvalid(f"{FLEETCAST_JSON}: unknown architecture {architecture!r}; known are {names}")
    try:
        record = msgspec.convert(dict(config), known.config)
    except msgspec.ValidationError as error:
        raise ArchiveInvalid(f"{FLEETCAST_JSON}: config of {architecture}: {error}") from error
    return _build(architecture, record)


def random_tensors(family: Family, seed: int) -> dict[str, Float32]:
    """A state dict by the reference's own initialisation: the same numbers for the same seed. For demos and tests."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        state = family.reference().state_dict()
    return {name: tensor.numpy().astype(np.float32) for name, tensor in state.items()}


@cache
def _build(architecture: str, config: msgspec.Struct) -> Family:
    digest = sha256(msgspec.json.encode(config, order="sorted")).hexdigest()[:16]
    return ARCHITECTURES[architecture].family(f"{architecture}-{digest}", config)


def check_forecast(family: Family, forecast: Forecast) -> None:
    """What the forecast promises is what the network takes and gives. Raises ArchiveInvalid that names the field."""
    products, output = len(forecast.products), family.output_shape
    if products > 1 and output[1:-1] == (products,):
        output = (output[0], products * output[-1])
    if len(family.input_shape) != 2 or len(output) != 2:  # noqa: PLR2004 -- as the message says
        shapes = f"{list(family.input_shape)} -> {list(family.output_shape)}"
        wanted = f"[features, context] -> [prediction, {f'{products}, ' if products > 1 else ''}quantiles]"
        raise ArchiveInvalid(f"{FLEETCAST_JSON}: a forecast needs a network {wanted}, but {family.key} has {shapes}")
    (features, context), (prediction, quantiles) = family.input_shape, output
    for field, stated, network in (
        ("inputs", len(forecast.inputs), features),
        ("context_length", forecast.context_length, context),
        ("prediction_length", forecast.prediction_length, prediction),
        ("quantile_levels" + " times products" * (products > 1), len(forecast.quantile_levels) * products, quantiles),
    ):
        if stated != network:
            what = f"forecast.{field} says {stated}, but the network {family.key} has {network}"
            raise ArchiveInvalid(f"{FLEETCAST_JSON}: {what}")

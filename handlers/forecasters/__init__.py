"""The network architectures a forecaster archive can name, one file each, and the way from its record to its family."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from types import MappingProxyType
from typing import Annotated, Any

import msgspec
import numpy as np
import torch
from msgspec import Meta

from handlers.base import Family, Float32
from handlers.forecasters.deepar import Deepar, DeeparConfig
from handlers.forecasters.deepstate import Deepstate, DeepstateConfig
from handlers.forecasters.ensemble import MOST_MEMBERS, Ensemble
from handlers.forecasters.esrnn import Esrnn, EsrnnConfig
from handlers.forecasters.gru import Gru, GruConfig
from handlers.forecasters.lear import Lear, LearConfig
from handlers.forecasters.mlp import Mlp, MlpConfig
from handlers.forecasters.mqcnn import Mqcnn, MqcnnConfig
from handlers.forecasters.mqrnn import Mqrnn, MqrnnConfig
from handlers.forecasters.recursive import Recursive, RecursiveConfig
from handlers.forecasters.seq2seq import Seq2Seq, Seq2SeqConfig
from handlers.forecasters.tcn import Tcn, TcnConfig
from model_store.archives.manifest import FLEETCAST_JSON, Forecast, Spec
from model_store.errors import ArchiveInvalid


@dataclass(frozen=True, slots=True)
class Architecture:
    """The record an archive's `config` is validated as, and what makes the family of (key, config)."""

    config: type[msgspec.Struct]
    family: Callable[[str, Any], Family]


ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {
        "deepar": Architecture(DeeparConfig, Deepar),
        "deepstate": Architecture(DeepstateConfig, Deepstate),
        "esrnn": Architecture(EsrnnConfig, Esrnn),
        "gru": Architecture(GruConfig, Gru),
        "lear": Architecture(LearConfig, Lear),
        "mlp": Architecture(MlpConfig, Mlp),
        "mqcnn": Architecture(MqcnnConfig, Mqcnn),
        "mqrnn": Architecture(MqrnnConfig, Mqrnn),
        "recursive": Architecture(RecursiveConfig, Recursive),
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
    """The family by name and (partial) config; fields left out have the architecture's defaults. Raises as `family`.

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
    return _build(architecture, record, members)


def random_tensors(family: Family, seed: int) -> dict[str, Float32]:
    """A state dict by the reference's own initialisation: the same numbers for the same seed. For demos and tests."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        state = family.reference().state_dict()
    return {name: tensor.numpy().astype(np.float32) for name, tensor in state.items()}


def samples(family: Family) -> bool:
    """Whether it answers sample paths instead of quantiles."""
    return isinstance(family, Deepar | Deepstate)


@cache
def _build(architecture: str, config: msgspec.Struct, members: int) -> Family:
    if members > 1:
        if samples(_build(architecture, config, 1)):
            what = "the mean of paths is no path; train more of them"
            raise ArchiveInvalid(f"{FLEETCAST_JSON}: config of {architecture}: {what} - at `$.members`")
        return Ensemble(_build(architecture, config, 1), members)
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
    last = "quantile_levels" + " times products" * (products > 1), len(forecast.quantile_levels) * products, quantiles
    if forecast.paths or samples(family):
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

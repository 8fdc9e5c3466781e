"""`mixture`: parts of several architectures in one archive; the answer is the weighted mean of their quantiles.

Each part is an architecture with its own config, or an ensemble of it by `members`, and reads its own channels of the
one input. The tensor `shares` [parts, quantiles] has a weight for every part and level; only their ratios matter. As in
an ensemble, quantiles are averaged level by level and in network numbers (Vincent 1912). A row is the shares and then
the rows of the parts side by side, so that a batch of mixtures takes one forward for each part, for all of its models.

A part may work with prices where the archive has their inverse hyperbolic sines: then prices of other days have
the same weight however far they lie from the usual, and forecasters that err otherwise mend each other. Its `linear`
channels are turned into prices (in the units of the scaler) before its forward, and its answer is turned back.

Parameters: those of the parts, and parts x quantiles.
"""

from collections.abc import Mapping, Sequence
from itertools import starmap
from typing import Annotated, Any

import msgspec
import numpy as np
import torch
from msgspec import Meta
from torch import nn

from handlers import forecasters
from handlers.base import Family, Float32, Shape
from handlers.forecasters.architecture import Architecture
from handlers.forecasters.network_config import QuantileConfig
from handlers.forecasters.row_layout import Layout, check_finite, check_tensors
from model_store.archives.manifest import FLEETCAST_JSON, PartSettings
from model_store.errors import ArchiveInvalid

MIXTURE = "mixture"
MOST_PARTS = 16
SHARES = "shares"
DEFAULT_PARTS: tuple[PartSettings, ...] = ({"architecture": "lear"}, {"architecture": "tcn"})
SCALING, LINEAR = "scaling", "linear"
#: fields of a part that are not its architecture's; `scaling` is what a user asks, and a fit turns it into `linear`
OF_PART = ("architecture", "inputs", SCALING, LINEAR)
MOST = 80.0  #: largest network number that is turned into a price: beyond it float32 has none
SHAPE = ("features", "context_length", "prediction_length", "quantiles")  #: fields that a part has of the mixture


class MixtureConfig(QuantileConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The config of `mixture`. x [features, context_length] -> [prediction_length, quantiles].

    A part is an object: its `architecture`, the channels that it reads as `inputs` (default: all), which of these it
    reads as prices (`linear`, places among its inputs; default: none), and the fields of its own config; its lengths
    and quantiles are the mixture's. `stack`: a fit learns the shares from what it holds
    out; otherwise they are equal.
    """

    parts: Annotated[tuple[PartSettings, ...], Meta(min_length=1, max_length=MOST_PARTS)] = DEFAULT_PARTS
    stack: bool = True

    def __post_init__(self) -> None:
        """Raises ValueError for a part without an architecture, or for channels that do not exist."""
        for i, part in enumerate(self.parts):
            if not str(part.get("architecture", "")):
                raise ValueError(f"part {i} names no architecture")
            if part["architecture"] == MIXTURE:
                raise ValueError(f"part {i} is a mixture; name its parts here instead")
            for place in list_inputs(part, self.features):
                if not 0 <= place < self.features:
                    raise ValueError(f"part {i} reads channel {place}, but there are {self.features}")
            read = len(list_inputs(part, self.features))
            for place in list_linear(part):
                if not 0 <= place < read:
                    raise ValueError(f"part {i} reads its channel {place} as prices, but it has {read}")

    def __hash__(self) -> int:
        """Hash what is compared: a dict of settings has no hash of its own."""
        return hash(msgspec.json.encode(self, order="sorted"))


def list_parts(config: Mapping[str, Any]) -> Sequence[PartSettings]:
    """List the parts that a config names, or the default ones. Raises ArchiveInvalid."""
    try:
        found: list[PartSettings] = msgspec.convert(config.get("parts", DEFAULT_PARTS), list[PartSettings])
    except msgspec.ValidationError as error:
        raise ArchiveInvalid(f"{FLEETCAST_JSON}: config of {MIXTURE}: parts: {error}") from error
    return found


def list_inputs(part: PartSettings, features: int) -> Sequence[int]:
    """List the channels of the mixture that a part reads, in the part's order. Raises ValueError."""
    try:
        found: list[int] = msgspec.convert(
            part.get("inputs", list(range(features))), Annotated[list[int], Meta(min_length=1)]
        )
    except msgspec.ValidationError as error:
        raise ValueError(f"inputs of a part: {error}") from None
    return found


def list_linear(part: PartSettings) -> Sequence[int]:
    """List the places among the inputs of a part that it reads as prices. Raises ValueError."""
    try:
        found: list[int] = msgspec.convert(part.get(LINEAR, []), list[int])
    except msgspec.ValidationError as error:
        raise ValueError(f"{LINEAR} of a part: {error}") from None
    return found


def read_prices(x: torch.Tensor, places: torch.Tensor, axis: int) -> torch.Tensor:
    """Turn the channels at these places of an axis from inverse hyperbolic sines into prices; in a new tensor."""
    prices = x.index_select(axis, places).clamp(-MOST, MOST).sinh()
    return x.index_copy(axis, places, prices)


def make_part_config(config: MixtureConfig, part: PartSettings) -> dict[str, Any]:
    """Make the config of a part's family: its own fields, and the shape that the mixture gives it."""
    own = {name: value for name, value in part.items() if name not in OF_PART}
    return own | {
        "features": len(list_inputs(part, config.features)),
        "context_length": config.context_length,
        "prediction_length": config.prediction_length,
        "quantiles": config.quantiles,
    }


class MixtureReference(nn.Module):
    """The parts as plain networks, one after another."""

    def __init__(
        self, parts: Sequence[Family], places: Sequence[Sequence[int]], linear: Sequence[Sequence[int]], levels: int
    ) -> None:
        super().__init__()
        self.places, self.linear = places, linear
        self.parts = nn.ModuleList(part.reference() for part in parts)
        self.shares = nn.Parameter(torch.rand(len(parts), levels) + 0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Input x [N, features, context_length] -> [N, prediction_length, quantiles]."""
        answers = []
        for part, places, linear in zip(self.parts, self.places, self.linear, strict=True):
            read = x[:, list(places)]
            answers.append(part(read_prices(read, torch.tensor(linear), 1)).asinh() if linear else part(read))
        return mix_answers(torch.stack(answers, 1), self.shares)


def mix_answers(answers: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """Average answers [..., parts, prediction, quantiles] by shares [..., parts, quantiles]: [..., prediction, ...]."""
    shares = shares.float()
    weights = shares / shares.sum(-2, keepdim=True)
    return (answers * weights[..., None, :].to(answers.dtype)).sum(-3)


class Mixture:
    """The family: a row is the shares, and a row of the family of each part."""

    input_name = "x"

    def __init__(self, key: str, config: MixtureConfig) -> None:
        """Raises ArchiveInvalid for a part that cannot be built, or that answers paths instead of quantiles."""
        self.key, self.config = key, config
        self.parts = tuple(starmap(self._build_part, enumerate(config.parts)))
        self.places = tuple(tuple(list_inputs(part, config.features)) for part in config.parts)
        self.linear = tuple(tuple(list_linear(part)) for part in config.parts)
        self.input_shape: Shape = config.input_shape
        self.output_shape: Shape = config.output_shape
        self.read_shape: Shape = (config.features, max(part.read_shape[-1] for part in self.parts))
        self.parameters: Mapping[str, Shape] = {SHARES: (len(self.parts), config.quantiles)} | {
            f"parts.{i}.{name}": shape for i, part in enumerate(self.parts) for name, shape in part.parameters.items()
        }
        self._shares = Layout({SHARES: (len(self.parts), config.quantiles)})
        self.row_floats = self._shares.row_floats + sum(part.row_floats for part in self.parts)

    def __repr__(self) -> str:
        return f"<Mixture of {', '.join(part.key for part in self.parts)}, {self.row_floats} floats>"

    def _build_part(self, at: int, part: PartSettings) -> Family:
        try:
            family = forecasters.build_family(str(part["architecture"]), make_part_config(self.config, part))
        except ArchiveInvalid as error:
            said = str(error).removeprefix(f"{FLEETCAST_JSON}: ")
            raise ArchiveInvalid(f"{FLEETCAST_JSON}: config of mixture: part {at}: {said}") from error
        if forecasters.answers_paths(family):
            what = f"part {at}: {part['architecture']} answers sample paths; only quantiles can be averaged"
            raise ArchiveInvalid(f"{FLEETCAST_JSON}: config of mixture: {what}")
        return family

    def reference(self) -> nn.Module:
        """The plain networks, freshly initialised, in eval mode."""
        return MixtureReference(self.parts, self.places, self.linear, self.config.quantiles).eval()

    def row(self, tensors: Mapping[str, Float32]) -> Float32:
        """Make the shares and the rows of the parts side by side; see Family.row."""
        check_tensors(self.parameters, tensors)
        check_finite(np.concatenate([tensor.ravel() for tensor in tensors.values()]), tensors)
        shares = tensors[SHARES]
        if (shares < 0).any() or (shares.sum(0) <= 0).any():
            raise ArchiveInvalid(f"weights: tensor {SHARES!r} must have no negative number and no level of zeros only")
        head = np.zeros(self._shares.row_floats, np.float32)
        self._shares.arrays(head)[SHARES][...] = shares
        return np.concatenate([head, *(part.row(self.take_tensors(i, tensors)) for i, part in enumerate(self.parts))])

    def take_tensors(self, at: int, tensors: Mapping[str, Any]) -> dict[str, Any]:
        """Take the state dict of one part out of the mixture's."""
        return {name: tensors[f"parts.{at}.{name}"] for name in self.parts[at].parameters}

    def bind(self, block: torch.Tensor) -> Sequence[torch.Tensor]:
        """Rows [B, row_floats] -> the shares, and for each part its channels, those of them that it reads as prices, as
        many marks as bindings, and these.
        """
        end = self._shares.row_floats
        bound = [self._shares.views(block[:, :end])[SHARES]]
        for part, *channels in zip(self.parts, self.places, self.linear, strict=True):
            start, end = end, end + part.row_floats
            of_part = part.bind(block[:, start:end])
            bound += [torch.tensor(each, dtype=torch.long, device=block.device) for each in channels]
            bound += [block.new_empty(len(of_part)), *of_part]
        return bound

    def forward(self, weights: Sequence[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        """Input x [B, features, context_length] -> [B, prediction_length, quantiles]; see Family.forward."""
        answers, at = [], 1
        for part in self.parts:
            places, linear, marks = weights[at : at + 3]
            start, at = at + 3, at + 3 + len(marks)
            read = x.index_select(1, places)
            if len(linear):
                answers.append(part.forward(weights[start:at], read_prices(read, linear, 1)).asinh())
            else:
                answers.append(part.forward(weights[start:at], read))
        return mix_answers(torch.stack(answers, 1), weights[0])


def describe_mixture(family: Family, tensors: Mapping[str, Float32]) -> dict[str, Any]:
    """Describe the parts of a mixture and their weights, in plain values; empty for any other family."""
    if not isinstance(family, Mixture):
        return {}
    weights = tensors[SHARES] / tensors[SHARES].sum(0)
    return {
        MIXTURE: [
            {
                "architecture": part["architecture"],
                "members": part.get("members", 1),
                **({SCALING: LINEAR} if part.get(LINEAR) else {}),
                "weight": round(float(of_levels.mean()), 4),
                "weights": [round(each, 4) for each in of_levels.tolist()],
            }
            for part, of_levels in zip(family.config.parts, weights, strict=True)
        ]
    }


ARCHITECTURE = Architecture(name=MIXTURE, config=MixtureConfig, family=Mixture, fit="parts")

"""The config fields that several architectures share, each with its range, and the limits on what a config may ask for.

A field that only one architecture has, and a check of its own, stands in that architecture's file.
"""

from math import prod
from typing import Annotated

from msgspec import Meta, Struct

from handlers.base import Shape

MOST_PRODUCTS = 2**31  #: multiplications a forecast: about a tenth of a second of one core
MOST_NUMBERS = 2**20  #: numbers in one input and in one answer

Hidden = Annotated[int, Meta(ge=1, le=512)]  #: units of a recurrent layer
Layers = Annotated[int, Meta(ge=1, le=4)]  #: recurrent layers


class QuantileConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The shapes of a network that gives quantiles: [features, context_length] -> [prediction_length, quantiles]."""

    features: Annotated[int, Meta(ge=1, le=1024)] = 8
    context_length: Annotated[int, Meta(ge=1, le=100_000)] = 168
    prediction_length: Annotated[int, Meta(ge=1, le=10_000)] = 24
    quantiles: Annotated[int, Meta(ge=1, le=1000)] = 5

    @property
    def input_shape(self) -> Shape:
        """(features, context_length)."""
        return self.features, self.context_length

    @property
    def output_shape(self) -> Shape:
        """(prediction_length, quantiles)."""
        return self.prediction_length, self.quantiles


class RecurrentConfig(QuantileConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The shapes and sizes of a recurrent network that gives quantiles; its time grows with the context."""

    context_length: Annotated[int, Meta(ge=1, le=10_000)] = 168
    hidden: Hidden = 48
    layers: Layers = 1


class PathsConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The shapes and sizes of a recurrent network of paths: [features, context_length] -> [prediction_length, paths].

    Its channels tell of the forecast steps in the last `prediction_length` columns of the context.
    """

    features: Annotated[int, Meta(ge=2, le=1024)] = 8  #: the first is the target, the last the seed
    context_length: Annotated[int, Meta(ge=2, le=10_000)] = 168
    prediction_length: Annotated[int, Meta(ge=1, le=10_000)] = 24
    paths: Annotated[int, Meta(ge=2, le=10_000)] = 100
    hidden: Hidden = 48
    layers: Layers = 1

    def __post_init__(self) -> None:
        """Raises ValueError for a context that has no steps before the forecast steps, or for too large shapes."""
        if self.prediction_length >= self.context_length:
            what = f"prediction_length {self.prediction_length} is not below context_length {self.context_length}"
            raise ValueError(f"{what}, whose last columns tell of the forecast steps")
        require_numbers(self.input_shape, self.output_shape, "paths")

    @property
    def input_shape(self) -> Shape:
        """(features, context_length)."""
        return self.features, self.context_length

    @property
    def output_shape(self) -> Shape:
        """(prediction_length, paths)."""
        return self.prediction_length, self.paths


def count_products(width: int, hidden: int, layers: int) -> int:
    """The number of multiplications in one step of an `nn.GRU` with `width` inputs."""
    return 3 * hidden * (width + hidden + (layers - 1) * 2 * hidden)


def require_products(count: int) -> None:
    """Check that one forecast takes few enough multiplications not to hold up a worker. Raises ValueError."""
    if count > MOST_PRODUCTS:
        what = f"a forecast takes {count} multiplications, {MOST_PRODUCTS} are allowed"
        raise ValueError(f"{what}; make context_length, prediction_length, hidden or layers smaller")


def require_numbers(input_shape: Shape, output_shape: Shape, last: str = "quantiles") -> None:
    """Check that a worker can hold many inputs and answers. Raises ValueError that calls the last dimension `last`."""
    for shape, fields in ((input_shape, "features x context_length"), (output_shape, f"prediction_length x {last}")):
        if prod(shape) > MOST_NUMBERS:
            raise ValueError(f"{fields} is {prod(shape)}, {MOST_NUMBERS} are allowed")


def require_known_steps(config: QuantileConfig) -> None:
    """Check that the last `prediction_length` columns, which tell of the forecast steps, exist. Raises ValueError."""
    if config.prediction_length > config.context_length:
        what = f"prediction_length {config.prediction_length} is above context_length {config.context_length}"
        raise ValueError(f"{what}, whose last columns tell of the forecast steps")

"""`seq2seq`: the decoder sees what is known of each forecast step, in order, and nothing of the past channels."""

import numpy as np
import pytest
import torch

from handlers.forecasters import build_family, random_tensors
from model_store.errors import ArchiveInvalid

CONFIG = {"features": 4, "past": 2, "context_length": 9, "prediction_length": 6, "quantiles": 2, "hidden": 7}


def test_default_size() -> None:
    """The number of parameters that the documentation states."""
    assert sum(np.prod(shape) for shape in build_family("seq2seq", {}).parameters.values()) == 16_805


@pytest.mark.parametrize(("channel", "column"), [(0, 4), (1, 8), (2, 2), (2, 3), (3, 5), (3, 8)])
def test_the_decoder_reads_its_steps_known_channels(channel: int, column: int) -> None:
    """With an encoder that forgets everything, a number changes the answers from the step on that it is known of.

    Column 3 of 9 is known of the first of 6 forecast steps; earlier columns and the two past channels are of none.
    """
    made = build_family("seq2seq", CONFIG)
    tensors = random_tensors(made, 3)
    tensors |= {name: np.zeros_like(each) for name, each in tensors.items() if name.startswith("encoder")}
    bound = made.bind(torch.from_numpy(made.row(tensors))[None])
    x = torch.zeros(1, *made.input_shape)
    before = made.forward(bound, x)
    x[0, channel, column] = 1
    changed = (made.forward(bound, x) != before)[0].any(1).tolist()
    first = column - 3 if channel >= 2 and column >= 3 else 6
    assert changed == [False] * first + [True] * (6 - first)


def test_the_encoder_hands_over_all_of_the_past() -> None:
    """The first column of a past channel reaches every step's answer, through every layer's state."""
    made = build_family("seq2seq", {**CONFIG, "layers": 3})
    tensors = random_tensors(made, 1)
    bound = made.bind(torch.from_numpy(made.row(tensors))[None])
    x = torch.zeros(1, *made.input_shape)
    before = made.forward(bound, x)
    x[0, 0, 0] = 10
    assert (made.forward(bound, x) != before)[0].any(1).all()


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"past": 8}, "past is 8 of 8 features, but the decoder needs a channel that is known"),
        ({"context_length": 23}, "prediction_length 24 is above context_length 23, whose last columns"),
        ({"past": -1}, r"\$.past"),
    ],
)
def test_a_config_without_anything_to_decode_from_is_refused(config: dict[str, int], said: str) -> None:
    """The message names the two fields that do not go together."""
    with pytest.raises(ArchiveInvalid, match=said):
        build_family("seq2seq", config)

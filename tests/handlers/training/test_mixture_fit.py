"""Mixtures are fitted part by part: each part is what it would be alone, and the shares come from the holdout."""

from typing import Any

import numpy as np
import pytest
import torch

from handlers.forecasters.mixture import SHARES
from handlers.training.fit import Fitted, ask_network, fit_forecasters, make_reference_network, suggest_inputs
from handlers.training.time_series import Series
from model_store.errors import ArchiveInvalid
from tests.handlers.training.test_fit import QUICK, make_series

pytestmark = pytest.mark.slow

PARTS = [{"architecture": "lear"}, {"architecture": "lear", "members": 2}, {"architecture": "mlp", "hidden": 8}]


def fit_mixture(series: list[Series], **config: object) -> list[Fitted]:
    """A mixture for each series, all together."""
    of = {"parts": PARTS, **config}
    return fit_forecasters(series, suggest_inputs(series, "mixture", of), "mixture", of, QUICK)  # type: ignore[arg-type]


def test_parts_are_what_they_would_be_alone() -> None:
    """A linear part has the coefficients that `--architecture lear` finds, to which its channels were brought."""
    series = [make_series(seed, known=2) for seed in range(2)]
    mixed = fit_mixture(series)
    alone = fit_forecasters(series, suggest_inputs(series, "lear", {}), "lear", {}, QUICK)
    for mixture, lear in zip(mixed, alone, strict=True):
        np.testing.assert_allclose(mixture.tensors["parts.0.head.weight"], lear.tensors["head.weight"], atol=1e-5)
        parts = mixture.config["parts"]
        assert isinstance(parts, list)
        first = parts[0]
        assert isinstance(first, dict)
        read = first["inputs"]
        assert isinstance(read, list)
        assert [mixture.forecast.inputs[place] for place in read] == list(lear.forecast.inputs)
        assert (mixture.forecast.origin, mixture.forecast.context_length) == ("00:00", 192)


def test_a_linear_part_is_what_it_would_be_in_an_archive_of_linear_scaling() -> None:
    """It is fitted to prices, and the mixture answers with what it forecasts; in an archive that is linear throughout,
    it is a part as any other.
    """
    series = [make_series(seed, known=2) for seed in range(2)]
    parts = [{"architecture": "lear", "scaling": "linear"}, {"architecture": "lear"}]
    mixed = fit_mixture(series, parts=parts)
    recipes = suggest_inputs(series, "lear", {}, scaling="linear")
    alone = fit_forecasters(series, recipes, "lear", {}, QUICK)
    for mixture, lear, each in zip(mixed, alone, series, strict=True):
        np.testing.assert_allclose(mixture.tensors["parts.0.head.weight"], lear.tensors["head.weight"], atol=1e-4)
        config: Any = mixture.config
        assert (config["parts"][0]["linear"], "scaling" in config["parts"][0]) == ([0], False)
        only = {**mixture.tensors, SHARES: np.array([[1.0] * 5, [0.0] * 5], np.float32)}
        end = len(each.values) - 24
        request = {"instances": [each.instance(end - 192, end, 24)]}
        answers = [
            ask_network(make_reference_network(name, config, tensors), forecast, request)["predictions"][0]["mean"]
            for name, config, tensors, forecast in (
                ("mixture", mixture.config, only, mixture.forecast),
                ("lear", lear.config, lear.tensors, lear.forecast),
            )
        ]
        np.testing.assert_allclose(answers[0], answers[1], rtol=1e-3)
    of: Any = {"parts": parts}
    linear = suggest_inputs(series, "mixture", of, scaling="linear")
    config = fit_forecasters(series, linear, "mixture", of, QUICK)[0].config
    assert config["parts"][0] == config["parts"][1]


def test_shares_are_learnt_for_each_model_and_lower_its_loss() -> None:
    """Weights of one with a share of every part; `stack` off leaves them equal, with a loss that is no lower."""
    series = [make_series(seed, known=1) for seed in range(2)]
    learnt, equal = fit_mixture(series), fit_mixture(series, stack=False)
    for ours, plain in zip(learnt, equal, strict=True):
        np.testing.assert_allclose(plain.tensors[SHARES], 1 / 3, rtol=1e-6)
        np.testing.assert_allclose(ours.tensors[SHARES].sum(0), 1, rtol=1e-5)
        assert ours.loss < plain.loss
    assert not np.array_equal(learnt[0].tensors[SHARES], learnt[1].tensors[SHARES])


def test_a_model_does_not_depend_on_the_others() -> None:
    """Fitted with another series or alone, the numbers are the same up to rounding."""
    series = [make_series(seed) for seed in range(2)]
    together, (alone,) = fit_mixture(series)[1], fit_mixture(series[1:])
    shared = [name for name in alone.tensors if not name.startswith("parts.2")]  # whose start has another seed
    for name in shared[1:]:
        np.testing.assert_allclose(together.tensors[name], alone.tensors[name], atol=1e-4)
    assert torch.isfinite(torch.from_numpy(alone.tensors[SHARES])).all()


def test_members_of_a_mixture_are_members_of_its_parts() -> None:
    """An ensemble of mixtures is not fitted; the message says what to do."""
    series = [make_series(0)]
    of = {"parts": [{"architecture": "lear"}], "members": 2}
    with pytest.raises(ArchiveInvalid, match="give its parts members instead"):
        fit_forecasters(series, suggest_inputs(series, "mixture", of), "mixture", of, QUICK)  # type: ignore[arg-type]

"""Architectures: the batched forward over flat rows is the reference, for every configuration and mix of models."""

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from handlers.base import Family
from handlers.forecasters import ARCHITECTURES, build_family, check_forecast, get_family, random_tensors
from handlers.forecasters.tcn import Tcn, TcnConfig
from model_store.archives.manifest import ForecastSpec, InputChannel, Kind, Setting, Spec, Weights
from model_store.errors import ArchiveInvalid

SHAPES = {
    "features": st.integers(1, 9),
    "context_length": st.integers(1, 100),
    "prediction_length": st.integers(1, 7),
    "quantiles": st.integers(1, 5),
}
SHAPES_OF_PATHS = {"prediction_length": SHAPES["prediction_length"], "paths": st.integers(2, 9)}
SEASON = {"season": st.integers(2, 30)}
DECODER = {"contexts": st.integers(1, 5), "local": st.integers(1, 9)}
RECURRENT = {"hidden": st.integers(1, 33), "layers": st.integers(1, 4)}
LONG_ENOUGH = st.integers(7, 100)  #: a context for a decoder: not below the prediction length
CONFIGS = st.one_of(
    st.fixed_dictionaries(
        SHAPES | {"channels": st.integers(1, 33), "kernel": st.integers(1, 4), "layers": st.integers(1, 4)}
    ).map(lambda config: ("tcn", config)),
    st.fixed_dictionaries(SHAPES | {"hidden": st.integers(1, 40)}).map(lambda config: ("mlp", config)),
    st.fixed_dictionaries(SHAPES | RECURRENT).map(lambda config: ("gru", config)),
    st.fixed_dictionaries(
        SHAPES | RECURRENT | {"past": st.integers(0, 1), "features": st.integers(2, 9), "context_length": LONG_ENOUGH}
    ).map(lambda config: ("seq2seq", config)),
    st.fixed_dictionaries(
        SHAPES | {"context_length": LONG_ENOUGH, "past": st.integers(0, 1), "marks": st.integers(0, 1)}
    )
    .filter(lambda config: config["past"] + config["marks"] <= config["features"])
    .map(lambda config: ("lear", config)),
    st.fixed_dictionaries(
        SHAPES
        | {"context_length": LONG_ENOUGH, "hidden": st.integers(1, 20), "past": st.integers(0, 1)}
        | {"marks": st.integers(0, 1)}
    )
    .filter(lambda config: config["past"] + config["marks"] <= config["features"])
    .map(lambda config: ("ddnn", config)),
    st.fixed_dictionaries(SHAPES | RECURRENT | DECODER | {"context_length": LONG_ENOUGH}).map(
        lambda config: ("mqrnn", config)
    ),
    st.fixed_dictionaries(
        SHAPES | DECODER | {"channels": st.integers(1, 33), "kernel": st.integers(1, 4), "context_length": LONG_ENOUGH}
    ).map(lambda config: ("mqcnn", config)),
    st.fixed_dictionaries(
        SHAPES_OF_PATHS | RECURRENT | {"features": st.integers(2, 9), "context_length": st.integers(8, 100)}
    ).map(lambda config: ("deepar", config)),
    st.fixed_dictionaries(
        SHAPES_OF_PATHS | RECURRENT | SEASON | {"features": st.integers(2, 9), "context_length": st.integers(8, 60)}
    ).map(lambda config: ("deepstate", {**config, "harmonics": config["season"] % 4})),
    st.fixed_dictionaries(SHAPES | RECURRENT | SEASON).map(lambda config: ("esrnn", config)),
    st.fixed_dictionaries(SHAPES | RECURRENT | {"context_length": LONG_ENOUGH}).map(
        lambda config: ("recursive", config)
    ),
    st.fixed_dictionaries(SHAPES | {"hidden": st.integers(1, 20), "members": st.integers(2, 4)}).map(
        lambda config: ("mlp", config)
    ),
    st.fixed_dictionaries(SHAPES | {"channels": st.integers(1, 20), "members": st.integers(2, 3)}).map(
        lambda config: ("tcn", config)
    ),
    st.fixed_dictionaries(
        SHAPES
        | {
            "context_length": LONG_ENOUGH,
            "parts": st.lists(
                st.sampled_from(
                    [
                        {"architecture": "lear"},
                        {"architecture": "lear", "members": 3, "inputs": [0]},
                        {"architecture": "tcn", "channels": 5, "members": 2},
                        {"architecture": "mlp", "hidden": 7},
                    ]
                ),
                min_size=1,
                max_size=4,
            ),
        }
    ).map(lambda config: ("mixture", config)),
)


def assert_batched_is_reference(made: Family, models: int, batch: int, seed: int) -> None:
    """A batch of `batch` rows drawn from `models` different models answers as each reference does alone."""
    generator = np.random.default_rng(seed)
    states = [random_tensors(made, seed + i) for i in range(models)]
    rows = torch.from_numpy(np.stack([made.row(state) for state in states]))
    which = torch.from_numpy(generator.integers(0, models, batch))
    x = torch.from_numpy(generator.standard_normal((batch, *made.input_shape), np.float32))
    block = torch.empty(batch, made.row_floats)
    bound = made.bind(block)
    torch.index_select(rows, 0, which, out=block)  # gathered after binding, as a server does
    block_before, x_before = block.clone(), x.clone()
    first, answer = made.forward(bound, x.flip(0)), made.forward(bound, x)
    expected = torch.empty(batch, *made.output_shape)
    with torch.no_grad():
        for model, state in enumerate(states):
            reference = made.reference()
            reference.load_state_dict({name: torch.from_numpy(tensor) for name, tensor in state.items()})
            expected[which == model] = reference(x[which == model])
    torch.testing.assert_close(answer, expected, atol=1e-5, rtol=1e-4)
    assert first.data_ptr() != answer.data_ptr(), "an answer must not be overwritten by the next forward"
    assert torch.equal(block, block_before)
    assert torch.equal(x, x_before)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(CONFIGS, st.integers(1, 3), st.integers(1, 20), st.integers(0, 2**31))
@example(
    (
        "ddnn",
        {
            "features": 1,
            "context_length": 7,
            "prediction_length": 1,
            "quantiles": 1,
            "hidden": 1,
            "past": 0,
            "marks": 1,
        },
    ),
    1,
    1,
    0,
)
def test_batched_is_reference_for_any_configuration(
    config: tuple[str, dict[str, Setting]], models: int, batch: int, seed: int
) -> None:
    """Any sizes, also contexts shorter than the receptive field, where zeros stand before every layer's input."""
    assert_batched_is_reference(build_family(*config), models, batch, seed)


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 2, 3, 33, 512])
@pytest.mark.parametrize(
    ("architecture", "config"),
    [
        ("mlp", {"context_length": 24, "hidden": 64}),
        ("tcn", {}),
        ("gru", {"context_length": 50, "hidden": 16}),
        ("seq2seq", {"context_length": 40, "prediction_length": 30, "hidden": 16}),
        ("lear", {"features": 4, "marks": 1}),
        ("mqcnn", {}),
        ("mqrnn", {"context_length": 50, "hidden": 16}),
        ("tcn", {"members": 3}),
        ("deepar", {"context_length": 50, "hidden": 16, "paths": 10}),
        ("deepstate", {"context_length": 50, "hidden": 16, "paths": 10}),
        ("esrnn", {"context_length": 50, "hidden": 16}),
        ("recursive", {"context_length": 50, "hidden": 16}),
        ("ddnn", {"features": 4, "marks": 1, "members": 2}),
        ("mixture", {"parts": [{"architecture": "lear", "members": 2}, {"architecture": "tcn"}]}),
        ("mixture", {"features": 2, "parts": [{"architecture": "lear"}, {"architecture": "mlp", "linear": [1]}]}),
    ],
)
def test_batched_is_reference_at_serving_sizes(architecture: str, config: dict[str, Setting], batch: int) -> None:
    """From one request to a tick of 512."""
    assert_batched_is_reference(build_family(architecture, config), min(batch, 12), batch, seed=7)


def test_batched_is_reference_for_the_default_mlp() -> None:
    """The wide first product, 1344 inputs."""
    assert_batched_is_reference(build_family("mlp", {}), 3, 5, seed=11)


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(CONFIGS, st.integers(1, 4), st.integers(0, 2**31))
def test_the_steps_that_are_read_give_the_answer_of_all(
    config: tuple[str, dict[str, Setting]], batch: int, seed: int
) -> None:
    """Bit for bit, whatever the other steps are, and without them."""
    made = build_family(*config)
    generator = np.random.default_rng(seed)
    bound = made.bind(torch.from_numpy(np.stack([made.row(random_tensors(made, seed))] * batch)))
    x = torch.from_numpy(generator.standard_normal((batch, *made.input_shape), np.float32))
    steps = made.read_shape[-1]
    assert made.read_shape == (*made.input_shape[:-1], steps)
    right = made.forward(bound, x).clone()
    others = x.clone()
    others[..., :-steps] = 1e9
    for given_x in (others, x[..., -steps:], x[..., -steps:].contiguous()):
        assert torch.equal(made.forward(bound, given_x), right)


def test_a_short_reach_is_known() -> None:
    """A convolution's receptive field, a decoder's known future, an ensemble's member's; a recurrence reads all."""
    shape = {"features": 3, "context_length": 100, "prediction_length": 30}
    reach = {"kernel": 3, "layers": 2}
    found = {
        "tcn": build_family("tcn", shape | reach),
        "ensemble": build_family("tcn", shape | reach | {"members": 2}),
        "mqcnn": build_family("mqcnn", shape | {"kernel": 3, "layers": 2}),
        "gru": build_family("gru", shape),
    }
    assert {name: made.read_shape for name, made in found.items()} == {
        "tcn": (3, 9), "ensemble": (3, 9), "mqcnn": (3, 30), "gru": (3, 100)
    }  # fmt: skip


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_a_binding_made_in_inference_mode_works_outside(architecture: str) -> None:
    """A binding may be used with and without inference mode, and x may be a strided view."""
    made = build_family(architecture, {"context_length": 30})
    row = torch.from_numpy(made.row(random_tensors(made, 1)))[None]
    x = torch.randn(1, made.input_shape[1], made.input_shape[0]).transpose(1, 2)
    with torch.inference_mode():
        bound = made.bind(row.clone())  # the clone is an inference tensor
        inside = made.forward(bound, x)
    assert torch.equal(inside, made.forward(bound, x))


@pytest.mark.slow
@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_rows_of_bfloat16_answer_nearly_alike(architecture: str) -> None:
    """A worker may run its forwards so, on inputs of float32: answers differ by roundings, and drawn paths are those of
    the same seed, which bfloat16 cannot hold.
    """
    made = build_family(architecture, {"context_length": 30})
    block = torch.from_numpy(np.stack([made.row(random_tensors(made, seed)) for seed in range(3)]))
    x = torch.randn((3, *made.input_shape), generator=torch.Generator().manual_seed(0))
    samples = ARCHITECTURES[architecture].samples
    if samples:
        x[:, -1] = torch.tensor([[2.0**23 + 1], [2.0**23 + 3], [2.0**24 - 1]])
    answer = made.forward(made.bind(block), x)
    short = made.forward(made.bind(block.bfloat16()), x)
    assert short.dtype == (torch.float32 if samples or architecture == "esrnn" else torch.bfloat16)
    torch.testing.assert_close(short.float(), answer, atol=0.15, rtol=0.05)


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_parameters_are_the_state_dict(architecture: str) -> None:
    """What the family says it needs is what its reference is saved as, and rows are whole cache lines."""
    made = build_family(architecture, {"features": 3, "context_length": 11, "prediction_length": 4})
    state = made.reference().state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == dict(made.parameters)
    assert made.row_floats % 16 == 0
    assert made.row(random_tensors(made, 0)).shape == (made.row_floats,)


def test_default_tcn_is_the_size_the_design_counts_on() -> None:
    """17,528 parameters in a row of at most 70 KB: what memory per model is promised from."""
    made = build_family("tcn", {})
    assert sum(np.prod(shape) for shape in made.parameters.values()) == 17_528
    assert made.row_floats * 4 <= 70_400


def test_random_tensors_depend_on_the_seed_alone() -> None:
    """Same seed, same numbers, whatever torch's global generator did; another seed, other numbers."""
    made = build_family("tcn", {"layers": 1})
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    first = random_tensors(made, 5)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(2)
    again, other = random_tensors(made, 5), random_tensors(made, 6)
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not np.array_equal(first["head.weight"], other["head.weight"])


def make_spec(architecture: str = "tcn", forecast: ForecastSpec | None = None, **config: object) -> Spec:
    """A forecaster's record, of 2 channels unless the config says otherwise."""
    merged = msgspec.convert({"features": 2, **config}, dict[str, Setting])
    return Spec(
        kind=Kind.FORECASTER,
        weights=Weights(file="weights.safetensors"),
        architecture=architecture,
        config=merged,
        forecast=forecast,
    )


FORECAST = ForecastSpec(
    frequency="1h",
    context_length=168,
    prediction_length=24,
    quantile_levels=(0.1, 0.3, 0.5, 0.7, 0.9),
    inputs=(InputChannel(source="target"), InputChannel(source="target", lag=168)),
)


SEVERAL = replace(FORECAST, products=("energy", "reserve"))


def test_equal_configs_share_one_family() -> None:
    """Families are the same object, and have the same key, exactly when config and architecture are equal."""
    assert get_family(make_spec(layers=2)) is get_family(make_spec(layers=2, channels=32))  # 32 is the default
    keys = [get_family(make_spec(layers=2)).key, get_family(make_spec(layers=3)).key, get_family(make_spec("mlp")).key]
    assert len(set(keys)) == 3
    assert keys[0].startswith("tcn-")


@pytest.mark.parametrize(
    ("wrong", "names"),
    [
        (make_spec("lstm"), f"unknown architecture 'lstm'; known are {', '.join(ARCHITECTURES)}"),
        (make_spec(channels=0), r"\$.channels"),
        (make_spec(kernel="3"), r"\$.kernel"),
        (make_spec(kernel=True), r"\$.kernel"),
        (make_spec(width=3), "width"),
        (make_spec("mlp", layers=4), "layers"),
        (make_spec(forecast=FORECAST, features=3), "forecast.inputs says 2, but the network tcn-[0-9a-f]+ has 3"),
        (make_spec(forecast=FORECAST, context_length=100), "forecast.context_length says 168"),
        (make_spec(forecast=FORECAST, prediction_length=48), "forecast.prediction_length says 24"),
        (make_spec(forecast=FORECAST, quantiles=9), "forecast.quantile_levels says 5"),
        (make_spec(forecast=SEVERAL, quantiles=5), "forecast.quantile_levels times products says 10, but .* has 5"),
    ],
)
def test_wrong_records_are_refused_by_field(wrong: Spec, names: str) -> None:
    """A record that does not describe a network of ours says which field is wrong."""
    with pytest.raises(ArchiveInvalid, match=names):
        get_family(wrong)


def test_a_fitting_forecast_is_taken() -> None:
    """The cross-check lets the right record through; several products lie side by side, or on an axis of their own."""
    assert get_family(make_spec(forecast=FORECAST)).output_shape == (24, 5)
    assert get_family(make_spec(forecast=SEVERAL, quantiles=10)).output_shape == (24, 10)
    check_forecast(Outputs(24, 2, 5), SEVERAL)
    for wrong in (Outputs(24, 3, 5), Outputs(24, 10, 1), Outputs(24)):
        with pytest.raises(
            ArchiveInvalid, match=r"needs a network \[features, context\] -> \[prediction, 2, quantiles"
        ):
            check_forecast(wrong, SEVERAL)
    with pytest.raises(ArchiveInvalid, match=r"needs a network .*\[prediction, quantiles\]"):
        check_forecast(Outputs(24, 1, 5), FORECAST)


class Outputs(Tcn):
    """A network of two channels that gives answers of some shape."""

    def __init__(self, *shape: int) -> None:
        super().__init__("other", TcnConfig(features=2))
        self.output_shape = shape


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_wrong_tensors_are_refused_by_name(architecture: str) -> None:
    """Missing, extra, misshapen and mistyped tensors never become a row."""
    made = build_family(architecture, {"features": 2, "context_length": 5, "prediction_length": 4})
    good = random_tensors(made, 0)
    head = next(name for name in good if name.endswith("head.bias"))  # a mixture has one in each of its parts
    bias, out = good[head], made.parameters[head][0]
    for wrong, names in (
        ({name: tensor for name, tensor in good.items() if name != head}, rf"missing \['{head}'\]"),
        (good | {"foot.bias": bias}, r"config \['foot.bias'\]"),
        (good | {head: bias[:-1]}, rf"'{head}' must be float32 \[{out}\], not float32 \[{out - 1}\]"),
        (good | {head: bias.astype(np.float64)}, "float64"),
    ):
        with pytest.raises(ArchiveInvalid, match=names):
            made.row(wrong)


@pytest.mark.parametrize("number", [np.nan, np.inf])
@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_non_finite_tensors_are_refused_by_name(architecture: str, number: float) -> None:
    """One bad number in any tensor is found, also where it is folded into others before it reaches the row."""
    made = build_family(architecture, {"features": 2, "context_length": 5, "prediction_length": 4})
    good = random_tensors(made, 0)
    for name, tensor in good.items():
        bad = tensor.copy()
        bad.flat[0] = number
        with pytest.raises(ArchiveInvalid, match=f"not finite: {name}$"):
            made.row(good | {name: bad})

"""The cost of a row is computed before any request runs, and limits of rows and requests refuse with the numbers."""

import msgspec
import pytest
import torch

from handlers.codecs.codec import FamilyCodec
from handlers.errors import RequestError
from handlers.forecasters import ARCHITECTURES, build_family
from handlers.kinds.row_work import row_work
from handlers.work import ROW_SIDE, RequestBudget, SessionLimits, Work, WorkLimits
from model_store.archives.manifest import ForecastSpec, InputChannel
from model_store.errors import ArchiveInvalid
from server import contract

CONTEXT = 16
FORECAST = ForecastSpec(
    frequency="h",
    context_length=CONTEXT,
    prediction_length=4,
    quantile_levels=(0.1, 0.5, 0.9),
    inputs=(InputChannel(source="target"),),
)
INSTANCE = {"start": "2024-01-01 00:00:00", "target": [1.0] * CONTEXT}


def make_codec(limits: WorkLimits) -> FamilyCodec:
    """A codec for forecasts with these limits."""
    network = build_family("mlp", {"features": 1, "context_length": CONTEXT, "prediction_length": 4, "quantiles": 3})
    return FamilyCodec(network, FORECAST, RequestBudget(Work(CONTEXT, 12, flops=1_000_000), limits))


def make_request(instances: int) -> bytes:
    """A forecast request of so many instances."""
    return msgspec.json.encode({"instances": [INSTANCE] * instances})


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_is_estimated(architecture: str) -> None:
    """Input, answer, products and scratch of each network are counted, and the global torch state is as before."""
    network = build_family(architecture, {})
    work = row_work(network)
    given, answered = network.input_shape, network.output_shape
    assert (work.given, work.answered) == (given[0] * given[1], answered[0] * answered[1])
    assert work.flops > network.row_floats  # every weight is multiplied at least once
    assert work.numbers >= work.scratch > 0
    assert work.seconds > 0
    assert row_work(network) is work  # found once
    assert torch.ones(2).sum() == 2


def test_an_ensemble_costs_its_members() -> None:
    """Three members take three times the products of one, and a mean."""
    one, three = (row_work(build_family("tcn", {"members": members})) for members in (1, 3))
    assert 3 * one.flops <= three.flops < 4 * one.flops


def test_products_in_place_count() -> None:
    """The hidden product of a recurrence is an operator in place: twice the hidden units cost over twice the work."""
    small, large = (row_work(build_family("gru", {"hidden": hidden})) for hidden in (32, 64))
    assert large.flops > 2 * small.flops


def test_an_input_too_large_to_hold_is_refused_before_anything_is_allocated() -> None:
    """A few hundred bytes of configuration ask for 400 MB a row."""
    with pytest.raises(ArchiveInvalid, match=rf"\[1024, 100000\] has 102400000 numbers, {ROW_SIDE} are allowed"):
        row_work(build_family("tcn", {"features": 1024, "context_length": 100_000}))


def test_a_row_beyond_the_limit_is_refused_before_the_operator_that_goes_beyond() -> None:
    """A deep convolution over a long context: the run of zeros ends at the limit, with the numbers in the message."""
    config = {"features": 40, "context_length": 100_000, "channels": 1024, "kernel": 3, "layers": 12}
    with pytest.raises(ArchiveInvalid, match=r"one row takes \d+ (numbers|floating).* or more, \d+ are allowed"):
        row_work(build_family("tcn", config))


def test_a_request_at_the_limit_of_numbers_is_decoded_and_one_beyond_it_refused() -> None:
    """The message has the instances and the numbers and names the setting; a single row is the archive's matter."""
    codec = make_codec(WorkLimits(numbers=3 * (CONTEXT + 12)))
    assert len(codec.decode(make_request(3), "", "").rows) == 3
    with pytest.raises(RequestError, match=r"4 instances of 16 .* are 112 numbers, 84 are allowed \(max_request_numb"):
        codec.decode(make_request(4), "", "")
    lines = b"\n".join([msgspec.json.encode(INSTANCE)] * 4)
    with pytest.raises(RequestError, match="max_request_numbers"):
        codec.decode(lines, "application/jsonlines", "")
    assert len(make_codec(WorkLimits(numbers=1)).decode(make_request(1), "", "").rows) == 1


def test_a_request_at_the_limit_of_operations_is_decoded_and_one_beyond_it_refused() -> None:
    """As for numbers."""
    codec = make_codec(WorkLimits(gflop=0.003))
    assert len(codec.decode(make_request(3), "", "").rows) == 3
    with pytest.raises(RequestError, match=r"4 instances take 0\.004 .*, 0\.003 are allowed \(max_request_gflop"):
        codec.decode(make_request(4), "", "")


def test_the_defaults_are_those_of_the_settings() -> None:
    """Tools without settings refuse what a server refuses."""
    assert WorkLimits() == WorkLimits(contract.MAX_REQUEST_GFLOP, contract.MAX_REQUEST_NUMBERS)
    assert SessionLimits() == SessionLimits(contract.MAX_SESSION_BYTES, contract.MAX_FORWARD_S)

"""Fleets made for load tests."""

import json
from pathlib import Path

import pytest

from handlers.codecs import JSON, FamilyCodec
from handlers.forecasters import build
from loadtest.fleet import CONFIG, LEVELS, fleet_names, make_archive, make_fleet, make_forecast, make_request
from model_store.archive import open_archive
from model_store.names import parse_model_name
from server import workshop
from server.options import settings_from


def test_names_are_distinct_and_valid() -> None:
    """As many names as asked, also beyond the markets' own; a smaller fleet is the beginning of a larger one."""
    names = fleet_names(500)
    assert len(set(names)) == 500
    assert [parse_model_name(name) for name in names] == names
    assert names[:3] == fleet_names(3)
    assert names[204] == "us/spp-south/reserve.mar"
    assert names[205] == "au/nsw1/energy-2.mar"


@pytest.mark.parametrize("architecture", ["tcn", "mlp"])
def test_every_archive_loads(tmp_path: Path, architecture: str) -> None:
    """Each proves its golden sample by the batched forward, against an answer of the reference network."""
    for name in make_fleet(str(tmp_path), 3, seed=5, architecture=architecture):
        place = workshop.place(settings_from({"store": str(tmp_path)}), name)
        assert "golden sample reproduced" in workshop.proved(place)


def test_seeds_decide() -> None:
    """The same seed gives the same bytes, another other weights."""
    family = build("tcn", CONFIG)
    archives = [make_archive(family, "tcn", "au/nsw1/energy.mar", seed) for seed in (1, 1, 2)]
    assert archives[0] == archives[1]
    opened = [open_archive(archive, "x").weights() for archive in archives]
    assert opened[0] != opened[2]


def test_requests_fit_the_forecast() -> None:
    """A made request is decoded by the contract of a made archive, with samples too; one step fewer is not enough."""
    family, forecast = build("tcn", CONFIG), make_forecast("EUR/MWh", 0)
    codec = FamilyCodec(family, forecast)
    body = json.dumps(make_request(7, num_samples=3, output_types=["samples", "quantiles"])).encode()
    call = codec.decode(body, JSON, JSON)
    assert call.rows.shape == (1, 8, 168)
    answer = json.loads(call.encode(call.rows[:, :1, :24].repeat(len(LEVELS), 1).transpose(0, 2, 1))[0])
    assert [len(answer["predictions"][0][key]) for key in ("samples", "quantiles")] == [3, len(LEVELS)]
    with pytest.raises(Exception, match="311 steps"):
        codec.decode(json.dumps(make_request(7, steps=311)).encode(), JSON, JSON)

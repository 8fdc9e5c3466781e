"""Archives made for load tests: each kind is one that the server takes."""

import json
import sys
from pathlib import Path

import pytest

from handlers.codecs.codec import JSON, FamilyCodec
from loadtest.fleets.network_shape import LEVELS, make_request
from loadtest.fleets.synthetic_archives import (
    LADDER,
    build_network,
    compute_size_shares,
    make_archive,
    make_forecast,
    pack_fitted,
)
from loadtest.fleets.synthetic_markets import fit_markets
from model_store.archives.archive import open_archive
from model_store.names import ModelName
from server.cli.setting_flags import settings_from
from server.offline.archive_location import locate_archive
from server.offline.archive_tools import verify_archive


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tcn", "tcn-8", "mlp-8", "gru", "seq2seq", "onnx"])
def test_every_kind_loads(tmp_path: Path, kind: str) -> None:
    """Each proves its golden sample by what serves it, against an answer of the reference network."""
    (tmp_path / "m.mar").write_bytes(make_archive(kind, "m.mar", 5))
    assert "golden sample reproduced" in verify_model(tmp_path)


@pytest.mark.slow
def test_a_fitted_model_loads(tmp_path: Path) -> None:
    """So does a model of a synthetic market, which the archive names."""
    (fitted,) = fit_markets([7], seed=2)
    packed = pack_fitted(fitted, "au/m.mar", 2)
    (tmp_path / "m.mar").write_bytes(packed)
    assert "golden sample reproduced" in verify_model(tmp_path)
    spec = open_archive(packed, "m").spec
    assert spec is not None
    assert spec.description == "fitted to the synthetic market market-007 of seed 2"


def verify_model(folder: Path) -> str:
    """What `fleetcast verify` says of m.mar."""
    return str(verify_archive(locate_archive(settings_from({"store": str(folder)}), ModelName("m.mar"))))


@pytest.mark.parametrize("kind", ["tcn", "onnx"])
def test_seeds_decide(kind: str) -> None:
    """The same seed gives the same bytes, another other weights."""
    archives = [make_archive(kind, "au/nsw1/energy.mar", seed) for seed in (1, 1, 2)]
    assert archives[0] == archives[1]
    opened = [open_archive(archive, "x").weights() for archive in archives]
    assert opened[0] != opened[2]


@pytest.mark.parametrize("kind", ["lstm", "tcn-", "tcn-wide", "tcn-9.5"])
def test_a_kind_that_there_is_not(kind: str) -> None:
    """The message lists those that there are."""
    if kind == "tcn-":  # no width is the default one
        assert build_network(kind).family is build_network("tcn").family
        return
    with pytest.raises(ValueError, match=f"no family '{kind}': known are .*tcn.*onnx, trained.*such as tcn-64"):
        build_network(kind)


def test_onnx_needs_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the package that writes graphs the error says what to install."""
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ValueError, match="pip install onnx"):
        make_archive("onnx", "m", 0)


def test_sizes_are_lognormal() -> None:
    """Shares sum to one; a wide law has all rungs, its middle most; a narrow one far away only the nearest."""
    wide = compute_size_shares(70_000, 1.0)
    assert list(wide) == list(LADDER)
    assert sum(wide.values()) == pytest.approx(1)
    assert max(wide, key=wide.__getitem__) == "tcn"
    assert set(compute_size_shares(1e9, 0.01)) == {"tcn-128"}


def test_requests_fit_the_forecast() -> None:
    """A made request is decoded by the contract of a made archive, with samples too; one step fewer is not enough."""
    codec = FamilyCodec(build_network("tcn").family, make_forecast("EUR/MWh", 0))
    body = json.dumps(make_request(7, num_samples=3, output_types=["samples", "quantiles"])).encode()
    call = codec.decode(body, JSON, JSON)
    assert call.rows.shape == (1, 8, 168)
    answer = json.loads(call.encode(call.rows[:, :1, :24].repeat(len(LEVELS), 1).transpose(0, 2, 1))[0])
    assert [len(answer["predictions"][0][key]) for key in ("samples", "quantiles")] == [3, len(LEVELS)]
    with pytest.raises(Exception, match="311 steps"):
        codec.decode(json.dumps(make_request(7, steps=311)).encode(), JSON, JSON)

"""The records of an archive: round trips, and errors that name the file and the field."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model_store.archives.manifest import (
    ForecastSpec,
    GoldenSample,
    InputChannel,
    Kind,
    MarManifest,
    MarModel,
    Scaler,
    Spec,
    Weights,
    encode_record,
    parse_golden,
    parse_mar_manifest,
    parse_spec,
)
from model_store.errors import ArchiveInvalid

NAMES = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20)
NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
SCALERS = st.builds(
    Scaler,
    kind=st.sampled_from(["identity", "linear", "asinh"]),
    center=NUMBERS,
    scale=st.floats(min_value=1e-6, max_value=1e9),
)
CHANNELS = st.one_of(
    st.builds(InputChannel, source=st.just("target"), lag=st.integers(0, 500), scaler=SCALERS),
    st.builds(InputChannel, source=st.just("dynamic_feat"), shift=st.integers(0, 6), index=st.integers(0, 1)),
    st.builds(InputChannel, source=st.just("calendar"), feature=st.sampled_from(["hour_sin", "weekend"])),
)
FORECASTS = st.builds(
    ForecastSpec,
    frequency=NAMES,
    context_length=st.integers(1, 1000),
    prediction_length=st.integers(6, 100),
    quantile_levels=st.sets(st.floats(0.001, 0.999), min_size=1, max_size=5).map(lambda levels: tuple(sorted(levels))),
    inputs=st.lists(CHANNELS, min_size=1, max_size=4).map(tuple),
    dynamic_feat=st.just(("load", "wind")),
    cat=st.lists(NAMES, max_size=2).map(tuple),
    floor=st.none() | st.floats(-1000, 0),
    cap=st.none() | st.floats(1, 20_000),
    scaler=SCALERS,
    pad_context=st.booleans(),
)
CONFIG_VALUES = st.one_of(
    st.integers(-(2**63), 2**63 - 1), NUMBERS, NAMES, st.booleans(), st.lists(st.integers(0, 99), max_size=3)
)
SPECS = st.builds(
    Spec,
    kind=st.just(Kind.FORECASTER),
    weights=st.builds(Weights, file=NAMES, sha256=st.none() | st.just("0a" * 32)),
    architecture=NAMES,
    config=st.dictionaries(NAMES, CONFIG_VALUES, max_size=4),
    forecast=st.none() | FORECASTS,
    golden=st.none() | NAMES,
    description=st.text(st.characters(codec="utf-8"), max_size=50),
)


@pytest.mark.slow
@given(SPECS)
def test_a_spec_survives_its_file(spec: Spec) -> None:
    """What is written to `fleetcast.json` is what is read back, and writing that again gives the same bytes."""
    written = encode_record(spec)
    read = parse_spec(written)
    assert read == spec
    assert encode_record(read) == written


@given(st.binary(max_size=200))
def test_any_bytes_are_a_record_or_refused(raw: bytes) -> None:
    """Bytes that are not JSON, not UTF-8 or not ours raise ArchiveInvalid and nothing else."""
    for parse in (parse_spec, parse_mar_manifest, lambda raw: parse_golden(raw, "golden.json")):
        with pytest.raises(ArchiveInvalid):
            parse(raw)


def make_forecaster(**changes: Any) -> dict[str, Any]:
    """A small sound `fleetcast.json` as an object, with top-level fields replaced."""
    forecast = {
        "frequency": "1h",
        "context_length": 4,
        "prediction_length": 2,
        "quantile_levels": [0.5],
        "inputs": [{"source": "target"}],
    }
    return {"kind": "forecaster", "weights": {"file": "w"}, "architecture": "tcn", "forecast": forecast, **changes}


def make_forecast(**changes: Any) -> dict[str, Any]:
    """The same with fields of `forecast` replaced."""
    return make_forecaster(forecast={**make_forecaster()["forecast"], **changes})


def make_correlation(**changes: Any) -> dict[str, Any]:
    """A small sound `fleetcast.json` of a correlation, with fields of `correlation` replaced."""
    inner = {"products": ["a.mar", "b.mar"], "horizon": 3, "method": "gaussian", "windows": 9, **changes}
    return {"kind": "correlation", "weights": {"file": "w"}, "correlation": inner}


def test_a_correlation_names_its_tensors() -> None:
    """Two factors, or the ranks of every window."""
    found = parse_spec(json.dumps(make_correlation()).encode())
    assert encode_record(parse_spec(encode_record(found))) == encode_record(found)
    assert found.correlation
    assert found.correlation.tensors == {"product_factor": (2, 2), "time_factor": (3, 3)}
    templates = parse_spec(json.dumps(make_correlation(method="schaake")).encode()).correlation
    assert templates
    assert templates.tensors == {"ranks": (9, 2, 3)}


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (make_correlation(products=[]), "$.correlation.products"),
        (make_correlation(products=["a.mar", "a.mar"]), "products must be different names"),
        (make_correlation(horizon=2501), "$.correlation.horizon"),
        (make_correlation(method="clayton"), "$.correlation.method"),
        (make_correlation(method="schaake", shrinkage_time=0.1), "shrinkage belongs to the method gaussian"),
        ({**make_correlation(), "kind": "onnx"}, "`correlation` belongs to archives of that kind"),
        ({"kind": "correlation", "weights": {"file": "w"}}, "`correlation` belongs to archives of that kind"),
        ({**make_correlation(), "golden": "g.json"}, "has no `forecast` and no `golden`"),
        (make_forecaster(kind="tree"), "$.kind"),
        (make_forecaster(weights={}), "`file` - at `$.weights`"),
        (make_forecaster(weights={"file": "w", "sha256": "abc"}), "$.weights.sha256"),
        (make_forecaster(format=2), "$.format"),
        (make_forecaster(architecture=""), "needs `architecture`"),
        (make_forecaster(kind="onnx"), "belong to forecasters"),
        (make_forecaster(colour="red"), "`colour`"),
        (make_forecaster(config={"a": {"b": 1}}), "$.config"),
        (make_forecast(context_length=0), "$.forecast.context_length"),
        (make_forecast(quantile_levels=[0.5, 0.1]), "increasing"),
        (make_forecast(quantile_levels=[]), "not empty"),
        (make_forecast(quantile_levels=[1.0]), "$.forecast.quantile_levels"),
        (make_forecast(inputs=[]), "at least one channel"),
        (make_forecast(inputs=[{"source": "target", "shift": 1}]), "the future target is unknown"),
        (make_forecast(inputs=[{"source": "calendar"}]), "needs `feature`"),
        (make_forecast(inputs=[{"source": "target", "feature": "hour_sin"}]), "has no `feature`"),
        (make_forecast(inputs=[{"source": "dynamic_feat"}]), "inputs[0].index is 0, but there are 0"),
        (
            make_forecast(inputs=[{"source": "calendar", "feature": "weekend", "shift": 3}]),
            "inputs[0].shift is 3, but 2",
        ),
        (make_forecast(products=[]), "products must be different and not empty"),
        (make_forecast(products=["price", "price"]), "products must be different"),
        (make_forecast(scalers=[{}]), "scalers is for archives of several products"),
        (make_forecast(products=["price", "reserve"], scalers=[{}]), "1 scalers for 2 products"),
        (make_forecast(products=["price", "reserve"], scaler={"scale": 2.0}, scalers=[{}, {}]), "exclude each other"),
        (make_forecast(products=["a", "b"], inputs=[{"source": "target", "product": 2}]), "inputs[0].product is 2"),
        (make_forecast(inputs=[{"source": "calendar", "feature": "weekend", "product": 1}]), "has no `product`"),
        (make_forecast(floor=10.0, cap=10.0), "not below cap"),
        (make_forecast(scaler={"scale": 0.0}), "$.forecast.scaler.scale"),
    ],
)
def test_an_error_names_the_file_and_the_field(record: dict[str, Any], said: str) -> None:
    """The author of an archive is told where to look."""
    with pytest.raises(ArchiveInvalid) as caught:
        parse_spec(json.dumps(record).encode())
    assert str(caught.value).startswith("fleetcast.json: ")
    assert said in str(caught.value)


def test_deeply_nested_json_is_refused() -> None:
    """A golden sample nested beyond the parser's depth is an invalid archive, not a dead process."""
    raw = b'{"response": {}, "request": {"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}}"
    with pytest.raises(ArchiveInvalid, match=r"golden\.json"):
        parse_golden(raw, "golden.json")


def test_a_mar_manifest_may_say_more_than_we_use() -> None:
    """Manifests of Multi Model Server carry fields of their own and have no serialized file."""
    raw = {
        "specificationVersion": "1.0",
        "license": "Apache-2.0",
        "model": {"modelName": "m", "handler": "s.py:handle"},
    }
    manifest = parse_mar_manifest(json.dumps(raw).encode())
    assert manifest == MarManifest(model=MarModel(model_name="m", handler="s.py:handle"))


def test_a_manifest_without_model_names_the_field() -> None:
    """The one object that a MAR manifest must have."""
    with pytest.raises(ArchiveInvalid, match=r"MAR-INF/MANIFEST\.json: .*`model`"):
        parse_mar_manifest(b"{}")


def test_history_reaches_back_by_the_longest_lag() -> None:
    """A lagged target needs steps before the context."""
    spec = parse_spec(
        json.dumps(make_forecast(inputs=[{"source": "target"}, {"source": "target", "lag": 144}])).encode()
    )
    assert spec.forecast is not None
    assert spec.forecast.history_length == 4 + 144


def test_a_golden_sample_survives_its_file() -> None:
    """Request, answer and tolerances are read back as written."""
    golden = GoldenSample(request={"x": [1.5, None, "NaN"]}, response={"y": {"z": [1]}}, abs_tolerance=0.25)
    assert parse_golden(encode_record(golden), "golden.json") == golden

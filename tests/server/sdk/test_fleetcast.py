"""The package `fleetcast`: it is cheap to import, gives the numbers of a server in process, and makes archives."""

import json
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fleetcast
from handlers.forecasters import build_family
from server.sdk import __version__
from tests.e2e.conftest import Serve
from tests.e2e.models import pack_forecaster
from tests.e2e.server import upload
from tests.s3 import S3Server

PAGE = (Path(__file__).parents[3] / "docs/python-client.md").read_text()
TCN = {"features": 1, "context_length": 20, "prediction_length": 6, "quantiles": 3, "channels": 4, "layers": 2}
FORECAST = {
    "frequency": "1h",
    "context_length": 20,
    "prediction_length": 6,
    "quantile_levels": [0.1, 0.5, 0.9],
    "inputs": [{"source": "target"}],
    "tail": "clamp",
}
HISTORY = np.linspace(20, 60, 20)
START = "2026-01-01 00:00:00"


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """An untrained forecaster that `fleetcast.pack` made of a state dict."""
    out = tmp_path / "au" / "m.mar"
    network = build_family("tcn", TCN).reference()
    packed = fleetcast.pack(out, architecture="tcn", config=TCN, weights=network.state_dict(), forecast=FORECAST)
    assert packed.bytes == out.stat().st_size
    assert packed.proof.startswith("tcn-")
    return out


@pytest.mark.slow
def test_the_import_takes_no_torch(archive: Path) -> None:
    """Neither the import nor a client loads torch, numpy or handlers; a model that is opened does."""
    code = f"""
import sys, fleetcast
client = fleetcast.Client("http://127.0.0.1:1")
options = fleetcast.ForecastOptions(quantiles=[0.5])
assert not {{"torch", "numpy", "handlers", "boto3", "pydantic"}} & set(sys.modules), sorted(sys.modules)
fleetcast.open_model({str(archive)!r})
assert "torch" in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=archive.parent)


def test_every_name_is_there_once() -> None:
    """What `dir` lists can be had, and is the class that our own code raises and returns; the version is one."""
    assert fleetcast.__version__ == __version__ == version("fleetcast")
    assert {each.__module__.partition(".")[0] for each in map(vars_of, dir(fleetcast)) if callable(each)} == {"server"}
    with pytest.raises(AttributeError, match="module 'fleetcast' has no attribute 'nix'"):
        _ = fleetcast.nix
    with pytest.raises(ModuleNotFoundError):
        __import__("fleetcast.client")


def vars_of(name: str) -> Any:
    """An attribute of the package."""
    return getattr(fleetcast, name)


def test_a_model_in_process(archive: Path) -> None:
    """One series, several by one forward, arrays and lists, missing values as None and NaN."""
    model = fleetcast.open_model(archive)
    assert (model.name, model.prove()) == ("m.mar", False)
    found = model.forecast(target=HISTORY, start=START, quantiles=[0.1, 0.5])
    assert (found.start, list(found.quantiles), len(found.mean)) == ("2026-01-01 20:00:00", ["0.1", "0.5"], 6)
    assert model.forecast(target=HISTORY.tolist(), start=START, quantiles=["0.1", "0.5"]) == found
    gaps = [None if i == 7 else value for i, value in enumerate(HISTORY.tolist())]
    requests = [fleetcast.ForecastRequest(target=target, start=START) for target in (gaps, np.array(gaps, float))]
    first, second = model.forecast_many(requests)
    assert first == second
    sampled = model.forecast(target=HISTORY, start=START, num_samples=5, seed=1)
    assert np.shape(sampled.samples) == (5, 6)


def test_what_cannot_be_opened_or_answered(archive: Path) -> None:
    """Each error is one of the SDK's classes and says what is wrong."""
    with pytest.raises(fleetcast.ModelNotFound, match=r"none\.mar"):
        fleetcast.open_model(archive.with_name("none.mar"))
    archive.with_name("bad.mar").write_bytes(b"no archive")
    with pytest.raises(fleetcast.ModelFailed, match=r"bad\.mar"):
        fleetcast.open_model(archive.with_name("bad.mar"))
    with pytest.raises(fleetcast.InvalidRequest) as refused:
        fleetcast.open_model(archive).forecast(target=[1.0], start=START)
    assert refused.value.field == "target"
    with pytest.raises(TypeError, match="a request cannot hold"):
        fleetcast.open_model(archive).forecast(target={1, object()}, start=START)
    with pytest.raises(ValueError, match="give --architecture"):
        fleetcast.pack(archive, architecture="tcn", onnx="model.onnx")


def check_table(client: fleetcast.Client, names: list[str], expected: fleetcast.ForecastResult) -> None:
    """The same call as a table: the numbers of the good model, and the errors of the others in their rows."""
    columns = {"model": names, "target": np.stack([HISTORY] * len(names))}
    table = client.forecast_table(columns, start=START, options=fleetcast.ForecastOptions(quantiles=[0.5]))
    steps = table.filter(table["error"].is_null())
    assert set(steps["model"].to_pylist()) == {names[0]}
    assert steps["mean"].to_pylist() == np.array(expected.mean, np.float32).tolist()
    assert steps["0.5"].to_pylist() == np.array(expected.quantile(0.5), np.float32).tolist()
    failed = table.filter(table["error"].is_valid())
    assert failed["item"].to_pylist() == [1, 2]
    assert [each.partition(":")[0] for each in failed["error"].to_pylist()] == ["not_found", "archive_failed"]


def check_rows(client: fleetcast.Client, names: list[str], expected: fleetcast.ForecastResult) -> None:
    """The same call as an array whose rows have fields: the same numbers and errors, in another."""
    rows = np.zeros(len(names), [("model", "U20"), ("target", "f8", HISTORY.shape)])
    rows["model"], rows["target"] = names, HISTORY
    table = client.forecast_table(rows, start=START, options=fleetcast.ForecastOptions(quantiles=[0.5]))
    steps = table[table["error"] == ""]
    assert steps["mean"].tolist() == np.array(expected.mean, np.float32).tolist()
    assert steps["0.5"].tolist() == np.array(expected.quantile(0.5), np.float32).tolist()
    failed = table[table["error"] != ""]
    assert failed["item"].tolist() == [1, 2]
    assert [each.partition(":")[0] for each in failed["error"].tolist()] == ["not_found", "archive_failed"]


@pytest.mark.e2e
def test_a_client_of_a_real_server(s3: S3Server, store: str, serve: Serve, archive: Path) -> None:
    """One model, many with bad ones, a body as it is, errors by class: the numbers of the model in process."""
    s3.put(store, "au/m.mar", archive.read_bytes())
    s3.put(store, "au/broken.mar", b"no archive")
    model = fleetcast.open_model(archive)
    with serve(workers=1, access_keys="key=secret") as server:
        with pytest.raises(fleetcast.AccessDenied):
            fleetcast.Client(server.url).forecast("au/m.mar", target=HISTORY, start=START)
        with fleetcast.Client(server.url, access_key=fleetcast.AccessKey("key", "secret")) as client:
            found = client.forecast("au/m.mar", target=HISTORY, start=START)
            assert found == model.forecast(target=HISTORY, start=START)
            names = ("au/m.mar", "au/none.mar", "au/broken.mar")
            requests = [fleetcast.ForecastRequest(model=name, target=HISTORY, start=START) for name in names]
            good, missing, broken = client.forecast_many(requests)
            assert good == found
            check_table(client, list(names), found)
            check_rows(client, list(names), found)
            assert (type(missing), missing.code, missing.instance) == (fleetcast.ModelNotFound, "not_found", 1)
            assert (type(broken), broken.code, broken.instance) == (fleetcast.ModelFailed, "archive_failed", 2)
            body = json.dumps({"instances": [{"start": START, "target": HISTORY.tolist()}]}).encode()
            reply = client.invoke("au/m.mar", body)
            assert reply.body == model.answer(body)
            assert (reply.content_type, reply.headers["x-fleetcast-cache"]) == ("application/json", "hit")
            with pytest.raises(fleetcast.InvalidRequest) as refused:
                client.invoke("au/m.mar", b"{")
            assert (refused.value.status, refused.value.error_type) == (400, "ValidationError")
            with pytest.raises(fleetcast.InvalidRequest, match="target"):
                client.forecast("au/m.mar", target=[1.0], start=START)


@pytest.mark.e2e
def test_the_pages_example(
    s3: S3Server, store: str, serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """docs/python-client.md runs as it stands, against a server and a folder that have its models."""
    (example,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    fleet = [pack_forecaster(f"au/{name}.mar", i, config=TCN, forecast=True) for i, name in enumerate(("nsw1", "vic1"))]
    upload(s3, store, fleet)
    (tmp_path / "models" / "au").mkdir(parents=True)
    for model in fleet:
        (tmp_path / "models" / model.name).write_bytes(model.data)
    monkeypatch.chdir(tmp_path)
    with serve(workers=1) as server:
        done = subprocess.run(
            [sys.executable, "-c", example.replace("http://127.0.0.1:8080", server.url)],
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == [
        "2026-01-17",
        *("au/nsw1.mar", "au/vic1.mar") * 2,
        "2",
    ]

"""The command line: settings, making and verification of archives, and the server as a process."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from typer.testing import CliRunner, Result

from handlers.forecasters import build_family, random_tensors
from loadtest.fleets.fleet import make_fleet
from loadtest.fleets.network_shape import make_request
from model_store.archives.archive import open_archive, read_tensors
from model_store.archives.manifest import GoldenSample
from server.cli.main import app
from server.cli.setting_flags import settings_from
from tests.handlers.kinds.test_onnx import make_doubling
from tests.patience import PATIENCE_S

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs/models-from-torch.md").read_text()
PORTS = ["--inference-port", "0", "--management-port", "0", "--metrics-port", "0"]


def run(*arguments: str) -> Result:
    """The command in this process."""
    return CliRunner().invoke(app, list(arguments))


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder without settings, with the files of the forecaster of docs/models-from-torch.md."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("FLEETCAST_") and name != "FLEETCAST_TEST_S3"]:
        monkeypatch.delenv(name)
    (config,) = re.findall(r"--config '(\{.*\})'", PAGE)
    (forecast,) = re.findall(r"```json.*?\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "config.json").write_text(config)
    (tmp_path / "forecast.json").write_text(forecast)
    save_file(random_tensors(build_family("tcn", json.loads(config)), 3), tmp_path / "w.safetensors")
    return tmp_path


def pack(out: str, *more: str) -> Result:
    """The page's forecaster into `out`."""
    files = ("--weights", "w.safetensors", "--config", "config.json", "--forecast", "forecast.json")
    return run("pack", out, "--architecture", "tcn", *files, *more)


# --- settings -------------------------------------------------------------------------------------------------------


def test_flags_win_over_variables_over_the_file(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The documented precedence, with one setting decided on each of the four levels."""
    (desk / "fleetcast.toml").write_text('store = "file"\nhost = "file"\nfronts = 3\n')
    monkeypatch.setenv("FLEETCAST_STORE", "variable")
    monkeypatch.setenv("FLEETCAST_HOST", "variable")
    settings = settings_from({"store": "flag", "host": None})
    assert (settings.store, settings.host, settings.fronts, settings.workers) == ("flag", "variable", 3, 0)


def test_flags_are_texts_of_every_type() -> None:
    """Numbers, sizes, choices, lists and mappings arrive as the settings' own types."""
    flags = {
        "workers": "2",
        "slab_bytes": "1MiB",
        "overload_status": "429",
        "pin": ["a", "b"],
        "access_keys": ["k=s=1"],
    }
    settings = settings_from({"store": "x", **flags})
    assert (settings.workers, settings.slab_bytes, settings.overload_status) == (2, 1 << 20, 429)
    assert (settings.pin, settings.access_keys["k"].get_secret_value()) == (["a", "b"], "s=1")


@pytest.mark.parametrize(
    ("arguments", "toml", "said"),
    [
        ([], "", "--store (or FLEETCAST_STORE, or store in fleetcast.toml) is required"),
        (["--store", "x", "--inference-port", "99999"], "", "--inference-port"),
        (["--store", "x", "--device", "tpu", "--workers", "-1"], "", "--device"),
        (["--store", "x", "--access-keys", "s3cret"], "", "--access-keys takes KEY=SECRET"),
        (["--store", "x"], "stor = 1", "fleetcast.toml: there is no setting 'stor'"),
        (["--store", "x"], "stor = ", "fleetcast.toml: Invalid value"),
        (["--store", "x", "--model-cache-bytes", "100KB"], "", "slab_bytes"),
    ],
)
def test_bad_settings_are_one_line(desk: Path, arguments: list[str], toml: str, said: str) -> None:
    """A wrong setting is said in one line that names it, with exit code 2, and without a traceback or a secret."""
    (desk / "fleetcast.toml").write_text(toml)
    result = run("serve", *arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert said in result.stderr
    assert "s3cret" not in result.stderr


def test_a_list_in_a_variable_is_json(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one place where flags and variables are written differently is explained when it is got wrong."""
    monkeypatch.setenv("FLEETCAST_PIN", "au/nsw1.mar")
    result = run("serve", "--store", "x")
    assert (result.exit_code, "is JSON" in result.stderr) == (2, True)


def test_help_teaches() -> None:
    """Every command's help has an example to copy; serve's has every setting."""
    for command in ("serve", "pack", "inspect", "verify", "invoke"):
        assert f"fleetcast {command} " in run(command, "--help").stdout
    assert "--revalidate-s SECONDS" in run("serve", "--help").stdout
    assert run("--version").stdout.startswith("fleetcast 0.")


def test_help_imports_nothing_of_the_work() -> None:
    """`--help` and `--version` load neither torch nor any library of a command; an unknown command is suggested."""
    work = "{'torch', 'numpy', 'boto3', 'urllib3', 'uvicorn', 'obstore', 'msgspec', 'structlog', 'rich'}"
    code = f"import sys, server.cli.main\ntry: server.cli.main.main()\nfinally: print({work} & set(sys.modules))"
    for flag in ("--help", "--version"):
        done = subprocess.run([sys.executable, "-c", code, flag], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "set()"), done.stderr
    assert "Did you mean 'serve'?" in run("serv").stderr


# --- archives -------------------------------------------------------------------------------------------------------


def test_the_readmes_forecaster(desk: Path) -> None:
    """What the page says about an own model works as it stands: pack, inspect, verify."""
    packed = pack("lu.mar", "--description", "the page's")
    assert packed.exit_code == 0, packed.stderr
    shown = run("inspect", "lu.mar", "--json")
    found = json.loads(shown.stdout)
    assert (found["kind"], found["spec"]["forecast"]["unit"]) == ("forecaster", "EUR/MWh")
    assert found["tensors"]["head.bias"] == [72]
    words = " ".join(run("inspect", "lu.mar").stdout.split())
    assert "blocks.0.conv.weight" in words
    zone, names = found["spec"]["forecast"]["time_zone"], ", ".join(found["spec"]["forecast"]["dynamic_feat"])
    assert f"clock {zone}, forecasts start at any time covariates {names or 'none'} tails" in words
    verified = run("verify", "lu.mar")
    assert (verified.exit_code, verified.stdout[:9]) == (0, "ok   lu.m")
    assert pack("again.mar", "--description", "the page's", "--name", "lu").exit_code == 0
    assert (desk / "lu.mar").read_bytes() == (desk / "again.mar").read_bytes()


def test_what_would_not_load_is_not_written(desk: Path) -> None:
    """A golden sample that is not reproduced, or weights of another configuration, leave no archive behind."""
    request = {
        "instances": [{"start": "2026-01-01", "target": [50.0] * 72}],
        "configuration": {"output_types": ["mean"]},
    }
    wrong = GoldenSample(request=request, response={"predictions": [{"start": "2026-01-04", "mean": [0.0] * 24}]})
    (desk / "golden.json").write_bytes(msgspec.json.encode(wrong))
    result = pack("lu.mar", "--golden", "golden.json")
    assert (result.exit_code, "golden sample is not reproduced" in result.stderr) == (2, True)
    result = pack("lu.mar", "--config", '{"features": 3, "context_length": 48, "quantiles": 3, "channels": 8}')
    assert (result.exit_code, "wrong shape" in result.stderr) == (2, True)
    assert run("pack", "lu.mar", "--weights", "w.safetensors").exit_code == 2
    assert not (desk / "lu.mar").exists()


def test_pack_makes_the_folder_of_its_path(desk: Path) -> None:
    """A first archive in a store that does not exist yet, as the page writes it."""
    result = pack("models/de/lu.mar")
    assert result.exit_code == 0, result.stderr
    assert (desk / "models/de/lu.mar").is_file()


NET = """
import torch
from neighbour import WIDTH

class Net(torch.nn.Module):
    def __init__(self, hidden: int = 4, recurrent: bool = False) -> None:
        super().__init__()
        self.first = torch.nn.Linear(WIDTH, hidden)
        self.rnn = torch.nn.GRU(hidden, hidden, batch_first=True) if recurrent else None
        self.norm = torch.nn.LayerNorm(hidden)

    def forward(self, x):
        h = torch.relu(self.first(x))
        return self.norm(h if self.rnn is None else self.rnn(h)[0])

def nothing():
    return 3
"""


@pytest.mark.slow
def test_a_module_of_ones_own(desk: Path) -> None:
    """A file, a class and its shapes become a graph; the weights come from safetensors or .pt, tensors alone."""
    (desk / "net.py").write_text(NET)
    (desk / "neighbour.py").write_text("WIDTH = 3")
    module = ("--module", "net.py:Net", "--inputs", '{"x": [5, 3]}')
    state = {"first.weight": torch.ones(6, 3), "first.bias": torch.zeros(6)}
    state |= {"norm.weight": torch.ones(6), "norm.bias": torch.full((6,), 7.0)}
    torch.save(state, desk / "w.pt")
    save_file({name: tensor.numpy() for name, tensor in state.items()}, desk / "w.safetensors")
    for weights, out in (("w.pt", "pt.mar"), ("w.safetensors", "st.mar")):
        packed = run("pack", out, *module, "--config", '{"hidden": 6}', "--weights", weights, "--name", "m")
        assert packed.exit_code == 0, packed.stderr
        assert ", batched, " in packed.stdout
    found = json.loads(run("inspect", "pt.mar", "--json").stdout)
    assert (found["kind"], found["tensors"]["first.weight"]) == ("graph", [6, 3])
    assert (found["graph"]["input"], found["graph"]["output"]) == ({"x": [5, 3]}, [5, 6])
    assert (found["graph"]["runs"], found["graph"]["operators"]["aten.linear.default"]) == ("batched", 1)
    assert "1 aten.relu.default" in " ".join(run("inspect", "pt.mar").stdout.split())
    assert (desk / "pt.mar").read_bytes() == (desk / "st.mar").read_bytes()
    np.testing.assert_array_equal(read_tensors(open_archive((desk / "pt.mar").read_bytes(), "m"))["norm.bias"], 7.0)
    assert run("pack", "rnn.mar", *module, "--config", '{"recurrent": true}').exit_code == 0
    assert "one by one: Batching rule not implemented for aten::gru" in run("verify", "rnn.mar").stdout


@pytest.mark.slow
def test_a_module_beside_packages_of_our_names(desk: Path) -> None:
    """A user's `handlers`, `server`, `model_store` and `loadtest` are what his file imports; his prints stay apart."""
    (desk / "net.py").write_text("from handlers.widths import WIDTH\nimport loadtest, model_store, server\n"
                                 "print(server.__file__, loadtest.MINE, model_store.MINE)\n" + NET)  # fmt: skip
    (desk / "neighbour.py").write_text("from server import MINE as WIDTH")
    (desk / "server.py").write_text("MINE = 3")
    for package in ("handlers", "model_store", "loadtest"):
        (desk / package).mkdir()
        (desk / package / "__init__.py").write_text("MINE = 3")
    (desk / "handlers" / "widths.py").write_text("WIDTH = 3")
    packed = run("pack", "own.mar", "--module", "net.py:Net", "--inputs", '{"x": [5, 3]}')
    assert packed.exit_code == 0, packed.stderr
    assert packed.stdout.startswith("own.mar: ")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--module", "net.py:Net"), "--module and --inputs belong together"),
        (("--module", "net.py:Net", "--inputs", '{"x": "a"}'), "--inputs: Expected `array`"),
        (("--module", "net.py:Net", "--inputs", '{"y": [3]}'), "torch.export cannot export Net"),
        (("--module", "gone.py:Net", "--inputs", '{"x": [3]}'), "--module gone.py:Net: give FILE.py:NAME"),
        (("--module", "net.py:Nix", "--inputs", '{"x": [3]}'), "AttributeError: module 'net' has no attribute 'Nix'"),
        (("--module", "net.py:nothing", "--inputs", '{"x": [3]}'), "it gives int, not a torch.nn.Module"),
        (("--module", "net.py:Net", "--inputs", '{"x": [3]}', "--weights", "w.safetensors"), "not the state dict of"),
        (("--module", "net.py:Net", "--inputs", '{"x": [3]}', "--weights", "evil.pt"), "not the state dict of"),
        (("--module", "net.py:Net", "--architecture", "tcn"), "give --architecture and --weights for a forecaster"),
        (("--architecture", "tcn"), "give a state dict with --weights"),
    ],
)
def test_a_module_that_cannot_be_packed(desk: Path, arguments: tuple[str, ...], said: str) -> None:
    """Each wrong flag or file is named in one line, a pickle that holds more than tensors is not read."""
    (desk / "net.py").write_text(NET)
    (desk / "neighbour.py").write_text("WIDTH = 3")
    torch.save({"first.weight": Path("x")}, desk / "evil.pt")
    result = run("pack", "own.mar", *arguments)
    assert (result.exit_code, said in result.stderr) == (2, True), result.stderr
    assert not (desk / "own.mar").exists()


def test_onnx_into_a_store(desk: Path, bucket: str) -> None:
    """An ONNX model is packed into an object store, looked into and proved there."""
    (desk / "model.onnx").write_bytes(make_doubling("n", 2))
    url = f"s3://{bucket}/fleet/de/at.mar"
    assert run("pack", url, "--onnx", "model.onnx").exit_code == 0
    assert json.loads(run("inspect", url, "--json").stdout)["kind"] == "onnx"
    assert run("verify", url).stdout.startswith(f"ok   {url}: onnx")


def test_one_bad_archive_of_many(desk: Path) -> None:
    """Verify goes on after a bad one, says a line each, and exits with 1."""
    assert pack("good.mar").exit_code == 0
    raw = (desk / "good.mar").read_bytes()
    (desk / "bad.mar").write_bytes(raw[: len(raw) // 2])
    result = run("verify", "bad.mar", "missing.mar", "good.mar")
    assert (result.exit_code, [line[:4] for line in result.stdout.splitlines()]) == (1, ["BAD ", "BAD ", "ok  "])


# --- processes ------------------------------------------------------------------------------------------------------


@contextmanager
def run_serve(folder: Path, *more: str) -> Iterator[tuple["subprocess.Popen[str]", list[str]]]:
    """`fleetcast serve` as a process, and the lines it printed until it was ready."""
    command = [sys.executable, "-m", "server.cli.main", "serve", *PORTS, "--disk-cache", str(folder / "disk"), *more]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "FLEETCAST_DEVICE": "cpu"}
    process = subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=2, text=True)
    try:
        assert process.stdout is not None
        lines: list[str] = []
        for line in process.stdout:
            lines.append(line)
            if line.startswith("ready"):
                break
        yield process, lines
    finally:
        process.kill()
        process.communicate()


@pytest.mark.e2e
def test_serve_and_invoke(desk: Path) -> None:
    """Started, asked by our own client, told to stop: the answer, the story, errors by type, exit code 0, no torch."""
    (name,) = make_fleet("store", models=1)
    (desk / "request.json").write_text(json.dumps(make_request(0)))
    flags = ("--store", "store", "--model-cache-bytes", "64MiB", "--workers", "1", "--grpc-port", "0")
    with run_serve(desk, *flags) as (process, lines):
        said = dict(line.rstrip("\n").split(maxsplit=1) for line in lines if line[0] != "w")
        assert "64.0 MiB for models" in next(line for line in lines if line.startswith("worker 0"))
        url = said["inference"].partition("/invocations")[0]
        answered = run("invoke", name, "--url", url, "--body", "request.json", "-v")
        assert answered.exit_code == 0, answered.stderr
        assert len(json.loads(answered.stdout)["predictions"][0]["mean"]) == 24
        assert "x-fleetcast-cache: miss" in answered.stderr
        mean = json.loads(answered.stdout)["predictions"][0]["mean"]
        called = run("invoke", name, "--url", url, "--body", "request.json", "--protocol", "forecasts")
        assert json.loads(called.stdout)["predictions"][0]["mean"] == mean
        served = run("invoke", name, "--url", url, "--body", "request.json", "--protocol", "torchserve")
        assert json.loads(served.stdout)["predictions"][0]["mean"] == mean
        by_v2 = run("invoke", name, "--url", url, "--body", "request.json", "--protocol", "v2")
        (text,) = json.loads(by_v2.stdout)["outputs"][0]["data"]
        assert json.loads(text)["predictions"][0]["mean"] == mean
        grpc = said["grpc"].partition(",")[0]
        by_grpc = run("invoke", name, "--url", grpc, "--body", "request.json", "--protocol", "grpc", "-v")
        (text,) = json.loads(by_grpc.stdout)["outputs"][0]["data"]
        assert json.loads(text)["predictions"][0]["mean"] == mean
        assert "x-fleetcast-cache: hit" in by_grpc.stderr
        absent = run("invoke", "nix.mar", "--url", grpc, "--body", "request.json", "--protocol", "grpc")
        assert (absent.exit_code, absent.stderr.partition("nix")[0]) == (1, "error: NOT_FOUND: "), absent.stderr
        (desk / "v2.json").write_text('{"inputs": []}')
        refused = run("invoke", name, "--url", url, "--body", "v2.json", "--protocol", "v2")
        assert (refused.exit_code, refused.stderr[:19]) == (1, "error: status 400: "), refused.stderr
        unknown = run("invoke", "nix.mar", "--url", url, "--body", "request.json")
        assert (unknown.exit_code, unknown.stderr.partition("nix")[0]) == (1, "error: ValidationError: ")
        assert "torch" not in Path(f"/proc/{process.pid}/maps").read_text()
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=PATIENCE_S)
        assert (process.returncode, out.partition(":")[0]) == (0, "stopping")


@pytest.mark.e2e
@pytest.mark.parametrize("traps", [["server.py", "handlers/__init__.py", "model_store.py"], ["server/__init__.py"]])
def test_nothing_of_the_working_folder_is_imported(desk: Path, traps: list[str]) -> None:
    """A server started beside a user's packages of our names runs none of their code, in none of its processes."""
    for trap in traps:
        (desk / trap).parent.mkdir(exist_ok=True)
        (desk / trap).write_text("open('ran', 'w').write(__file__)\nraise SystemExit(1)\n")
    (desk / "store").mkdir()
    command = [
        str(Path(sys.executable).with_name("fleetcast")),
        "serve",
        *PORTS,
        "--disk-cache",
        "disk",
        "--store",
        "store",
    ]
    process = subprocess.Popen([*command, "--workers", "1"], cwd=desk, stdout=subprocess.PIPE, stderr=2, text=True)
    try:
        assert process.stdout is not None
        assert any(line.startswith("ready") for line in process.stdout)
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 0
    finally:
        process.kill()
        process.communicate()
    assert not (desk / "ran").exists()


@pytest.mark.e2e
def test_a_busy_port(desk: Path) -> None:
    """The error names the flag to change."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        result = run(
            "serve", "--store", str(desk), "--management-port", "0", "--inference-port", str(taken.getsockname()[1])
        )
    assert (result.exit_code, "choose another port with --inference-port" in result.stderr) == (2, True)


@pytest.mark.e2e
def test_a_store_that_is_not_there(desk: Path) -> None:
    """What only a worker can find out ends the start with a clear last line."""
    command = [sys.executable, "-m", "server.cli.main", "serve", "--store", "nix", *PORTS]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    last = found.stderr.splitlines()[-1]
    assert (found.returncode, last.startswith("error: the model folder"), "does not exist" in last) == (2, True, True)


@pytest.mark.slow
def test_invoke_says_what_is_missing() -> None:
    """No body: what to send. No server: where it looked."""
    assert '{"instances"' in run("invoke", "a.mar").stderr
    with socket.create_server(("127.0.0.1", 0)) as sock:
        url = f"http://127.0.0.1:{sock.getsockname()[1]}"
    result = CliRunner().invoke(app, ["invoke", "a.mar", "--url", url, "--body", "-"], input="{}")
    assert (result.exit_code, url in result.stderr) == (2, True)


def test_archives_from_pack_are_plain_mar(desk: Path) -> None:
    """`--name` and `--version` are where tools of TorchServe users look for them."""
    assert pack("lu.mar", "--name", "lux", "--version", "2.1").exit_code == 0
    manifest = open_archive((desk / "lu.mar").read_bytes(), "lu.mar").mar
    assert manifest is not None
    assert (manifest.model.model_name, manifest.model.model_version) == ("lux", "2.1")

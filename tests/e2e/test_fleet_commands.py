"""`fleetcast ls`, `load`, `pin`, `unload`, `reload`, `rollback`, `top`: an operator's commands on a real server."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from server.cli.main import app
from tests.e2e.models import Model, pack_forecaster
from tests.e2e.server import Server, run_server, upload
from tests.s3 import S3Server

pytestmark = pytest.mark.e2e

MARKED = "x/[red]odd[/red].mar"  #: a terminal must show it as it is


@pytest.fixture(scope="module")
def house(s3: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, dict[str, Model]]]:
    """One worker and a few models."""
    bucket = s3.bucket()
    models = [pack_forecaster(name, i) for i, name in enumerate(("au/nsw1.mar", "au/vic1.mar", MARKED))]
    upload(s3, bucket, models)
    with run_server(s3, tmp_path_factory.mktemp("house"), f"s3://{bucket}", workers=1, fronts=1) as server:
        yield server, {model.name: model for model in models}


def run(server: Server, *arguments: str) -> Result:
    """The command against the server's management listener."""
    return CliRunner().invoke(app, [*arguments, "--url", server.addresses["management"]])


def list_lines(result: Result) -> list[dict[str, object]]:
    """What `--json` printed."""
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_models_are_loaded_pinned_listed_and_unloaded(house: tuple[Server, dict[str, Model]]) -> None:
    """Each command says what it did; a refused model fails the command and keeps none of the others from its turn."""
    server, _ = house
    loaded = run(server, "load", "au/nsw1.mar", "no/such.mar", MARKED)
    assert loaded.exit_code == 1
    assert "au/nsw1.mar is loaded, version " in loaded.stdout
    assert f"{MARKED} is loaded, version " in loaded.stdout
    assert loaded.stderr.startswith("no/such.mar: ")
    assert run(server, "pin", "au/vic1.mar").exit_code == 0
    listed = run(server, "ls").stdout
    assert MARKED in listed
    assert "ready, pinned" in listed
    assert "no/such.mar" in run(server, "ls", "--failed").stdout
    names = run(server, "ls", "--names", "--prefix", "au/").stdout.splitlines()
    assert {"au/nsw1.mar", "au/vic1.mar"} <= set(names)
    assert all(name.startswith("au/") for name in names)
    assert [row["model"] for row in list_lines(run(server, "ls", "--json", "--pinned"))] == ["au/vic1.mar"]
    assert run(server, "unpin", "au/vic1.mar").exit_code == 0
    (gone,) = list_lines(run(server, "unload", "au/vic1.mar", "--json"))
    assert (gone["model"], gone["unloaded_from"]) == ("au/vic1.mar", [0])
    assert "was not loaded" in run(server, "unload", "au/vic1.mar").stdout


def test_versions_go_back_and_forth(house: tuple[Server, dict[str, Model]], s3: S3Server) -> None:
    """`reload` serves what was uploaded, `rollback` the version before, `follow` the store again."""
    server, models = house
    first = str(list_lines(run(server, "load", "au/nsw1.mar", "--json"))[0]["version"])
    server.ask(models["au/nsw1.mar"].question(0))
    bucket = json.loads(run(server, "top", "--once", "--json").stdout)["store"].removeprefix("s3://")
    newer = pack_forecaster("au/nsw1.mar", 77)
    upload(s3, bucket, [newer])
    second = str(list_lines(run(server, "reload", "au/nsw1.mar", "--json"))[0]["version"])
    assert second != first
    server.ask(newer.question(0))
    kept = [each["version"] for each in list_lines(run(server, "ls", "au/nsw1.mar", "--versions", "--json"))]
    assert kept == [second, first]
    assert run(server, "rollback", "au/nsw1.mar").exit_code == 0
    server.ask(models["au/nsw1.mar"].question(0))
    assert "held by a rollback" in run(server, "ls", "au/nsw1.mar", "--versions").stdout
    assert "follows the store again" in run(server, "follow", "au/nsw1.mar").stdout
    server.ask(newer.question(0))


def test_top_shows_what_the_server_does(house: tuple[Server, dict[str, Model]]) -> None:
    """Counts of all processes, workers and fronts, and models that failed with the reason."""
    server, models = house
    run(server, "load", MARKED, "no/such.mar")
    run(server, "top", "--once", "--interval", "1")  # a reading serves for a second: the next is younger than the load
    before = json.loads(run(server, "top", "--once", "--json").stdout)
    for _ in range(5):
        server.ask(models[MARKED].question(0))
    shown = run(server, "top", "--once", "--interval", "1").stdout
    now = json.loads(run(server, "top", "--once", "--json").stdout)
    assert now["requests"]["200"] - before["requests"].get("200", 0) == 5
    assert now["cache_requests"]["hit"] - before["cache_requests"]["hit"] == 5
    for text in ("requests", "models resident", "worker 0", "front 0", "no/such.mar"):
        assert text in shown, shown


def test_doctor_says_what_limits_the_server(house: tuple[Server, dict[str, Model]]) -> None:
    """Of a server that nobody asks nothing; of one whose requests fail that they do, with what to do."""
    server, _ = house
    quiet = run(server, "doctor", "--seconds", "1")
    assert quiet.exit_code == 0, quiet.output
    assert "nothing limits the server" in quiet.stdout
    done = threading.Event()

    def ask_wrongly() -> None:
        while not done.is_set():
            server.post(MARKED, b"no JSON")

    asking = threading.Thread(target=ask_wrongly)
    asking.start()
    try:
        found = run(server, "doctor", "--seconds", "6", "--json")
    finally:
        done.set()
        asking.join()
    assert found.exit_code == 1
    names = [each["name"] for each in json.loads(found.stdout)["findings"]]
    assert "requests fail" in names


def test_errors_say_what_to_do(house: tuple[Server, dict[str, Model]], tmp_path: Path) -> None:
    """Of an address where no server is, of one that is no address, and of a flag that lacks its model."""
    nobody = CliRunner().invoke(app, ["ls", "--url", "http://127.0.0.1:9"])
    assert nobody.exit_code == 2
    assert "is `fleetcast serve` running there?" in nobody.stderr
    wrong = CliRunner().invoke(app, ["load", "m.mar", "--url", str(tmp_path)])
    assert "is not the address of a server" in wrong.stderr
    assert "--versions needs a model" in run(house[0], "ls", "--versions").stderr
    assert "POST /fleet/load/" in run(house[0], "ls", "not/loaded.mar").stderr

"""Tests without a container engine: files are linted, and the commands in them run outside containers."""

import json
import os
import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import pytest
import yaml

from loadtest.observe.processes import end_processes, find_free_port, is_reachable, wait_until
from tests.patience import PATIENCE_S

DOCKER = Path(__file__).parents[2] / "docker"
DOCKERFILES = sorted(DOCKER.glob("*.Dockerfile"))
BIN = Path(sys.executable).parent
needs_prometheus = pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is not installed")


def compose() -> dict[str, Any]:
    """The compose file."""
    found: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    return found


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_dockerfiles_are_clean(path: Path) -> None:
    """Hadolint finds nothing."""
    done = subprocess.run([BIN / "hadolint", path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_images_run_as_nobody_special_and_copy_what_exists(path: Path) -> None:
    """Non-root, pinned bases, a healthcheck, `serve` by default, and every copied path is in the repository."""
    text = path.read_text()
    assert re.search(r"^USER 10001$", text, re.MULTILINE)
    stages = set(re.findall(r"^FROM .* AS (\S+)", text, re.MULTILINE))
    bases = set(re.findall(r"^FROM (\S+)", text, re.MULTILINE)) - stages
    assert all(re.fullmatch(r"[\w./-]+:\d+\.\d+\.\d+\S*", base) for base in bases)
    assert 'ENTRYPOINT ["fleetcast"]' in text
    assert 'CMD ["serve"]' in text
    assert "HEALTHCHECK" in text
    for line in re.findall(r"^COPY (?!--from)(.+)$", text, re.MULTILINE):
        for source in line.split()[:-1]:
            assert (DOCKER.parent / source).exists(), f"{path.name} copies {source}"


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_dependencies_are_a_layer_of_their_own(path: Path) -> None:
    """The layer of the packages is copied from a stage that has none of our files but the lock; ours comes behind it.

    So a new version of the program sends a few megabytes again, and not the gigabyte of torch.
    """
    stages = re.split(r"^FROM ", path.read_text(), flags=re.MULTILINE)
    (packages,) = (stage for stage in stages if stage.partition("\n")[0].endswith("AS dependencies"))
    assert re.findall(r"^COPY (\S+)", packages, re.MULTILINE) == [re.search(r"docker/\S+\.lock", packages)[0]]  # type: ignore[index]
    copied = re.findall(r"^COPY --from=(\w+) (\S+) (\S+)$", stages[-1], re.MULTILINE)
    assert copied == [
        ("dependencies", "/opt/fleetcast", "/opt/fleetcast"),
        ("program", "/opt/program", "/opt/fleetcast"),
    ]


@pytest.mark.slow
def test_the_program_installed_beside_its_packages_runs(tmp_path: Path) -> None:
    """What the image's last `pip install` writes into a folder of its own is whole: both commands run from there.

    The environment that it is called from keeps its own: without --ignore-installed pip would remove that first.
    """
    before = distribution("fleetcast").read_text("RECORD")
    (line,) = re.findall(r"^RUN \S+/pip (install .* --prefix .*)$", DOCKERFILES[0].read_text(), re.MULTILINE)
    words = line.replace("/opt/program", str(tmp_path / "program")).split()
    source = shutil.copytree(DOCKER.parent, tmp_path / "source", ignore=leave_out_of_the_image)
    command = [sys.executable, "-m", "pip", *words]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (packages,) = (tmp_path / "program" / "lib").glob("python3.*/site-packages")
    for name in ("fleetcast", "fleetcast-load"):
        run = [sys.executable, str(tmp_path / "program" / "bin" / name), "--help"]
        shown = subprocess.run(run, env={**os.environ, "PYTHONPATH": str(packages)}, capture_output=True, check=False)
        assert shown.returncode == 0, shown.stderr
        assert name.encode() in shown.stdout
    assert (packages / "loadtest" / "report" / "page.css").exists()
    if shutil.which("gcc"):  # the images install it for this step
        assert list((packages / "handlers" / "codecs").glob("_quick_numbers.*.so"))
    assert distribution("fleetcast").read_text("RECORD") == before


def leave_out_of_the_image(folder: str, names: list[str]) -> set[str]:
    """What the image's build does not copy."""
    kept = {"server", "handlers", "model_store", "loadtest", "pyproject.toml", "README.md", "LICENSE"}
    return set(names) - kept if Path(folder) == DOCKER.parent else {name for name in names if name == "__pycache__"}


@pytest.mark.slow
def test_compose_fits_the_compose_specification() -> None:
    """The schema of the Compose specification accepts the file."""
    command = [str(BIN / "check-jsonschema"), "--builtin-schema", "vendor.compose-spec", str(DOCKER / "compose.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@needs_prometheus
def test_prometheus_configuration_is_valid() -> None:
    """Promtool accepts it; the file of the token is made when the services start."""
    command = ["promtool", "check", "config", "--syntax-only", str(DOCKER / "prometheus.yml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@contextmanager
def start_service(command: list[str], environment: Mapping[str, str], log: Path) -> Iterator[None]:
    """A service of the compose file as a process."""
    with log.open("wb") as output:
        process = subprocess.Popen(command, env={**os.environ, **environment}, stdout=output, stderr=output)
        with end_processes([process], gently=True):
            yield


@needs_prometheus
@pytest.mark.e2e
def test_the_compose_services_work_together(tmp_path: Path) -> None:
    """S3 server, fleet maker, token maker, server with its healthcheck, and Prometheus run by the file's own commands
    and environment (host names, ports and folders become this test's), and Prometheus ends up seeing the worker.

    The management and metrics listeners have the addresses that the file names, and take the file's tokens alone.
    """
    services = compose()["services"]
    ports = {name: find_free_port() for name in ("s3", "inference", "management", "metrics", "prometheus")}
    endpoint = f"http://127.0.0.1:{ports['s3']}"
    s3 = [arg.replace("0.0.0.0", "127.0.0.1").replace("5000", str(ports["s3"])) for arg in services["s3"]["command"]]
    environment = {k: str(v).replace("http://s3:5000", endpoint) for k, v in services["fleet"]["environment"].items()}
    serving = {k: str(v).replace("http://s3:5000", endpoint) for k, v in services["server"]["environment"].items()}
    serving |= {f"FLEETCAST_{name.upper()}_PORT": str(ports[name]) for name in ("inference", "management", "metrics")}
    serving = {k: v.replace("/var/lib/fleetcast/access", str(tmp_path)) for k, v in serving.items()}
    serving |= {"FLEETCAST_DISK_CACHE": str(tmp_path / "cache"), "FLEETCAST_HOST": "127.0.0.1"}
    make_tokens(services["tokens"], tmp_path)
    fleet = [sys.executable, *services["fleet"]["entrypoint"][1:], *services["fleet"]["command"]]
    config = tmp_path / "prometheus.yml"
    scraped = (DOCKER / "prometheus.yml").read_text().replace("server:8082", f"127.0.0.1:{ports['metrics']}")
    config.write_text(scraped.replace("5s", "1s").replace("/etc/prometheus/access", str(tmp_path)))
    shutil.copytree(DOCKER / "prometheus", tmp_path / "prometheus")
    watch = ["prometheus", *services["prometheus"]["command"], f"--storage.tsdb.path={tmp_path / 'data'}"]
    watch = [arg.replace("/etc/prometheus/prometheus.yml", str(config)) for arg in watch]
    watch.append(f"--web.listen-address=127.0.0.1:{ports['prometheus']}")
    with start_service([sys.executable, "-m", "moto.server", *s3], {}, tmp_path / "s3.log"):
        wait_until(lambda: is_reachable(ports["s3"]))
        subprocess.run(fleet, env={**os.environ, **environment}, check=True, capture_output=True)
        entry = [sys.executable, "-m", "server.cli.main", *services["server"]["command"]]
        with (
            start_service(entry, serving, tmp_path / "server.log"),
            start_service(watch, {}, tmp_path / "prometheus.log"),
        ):
            check = read_healthcheck().replace("127.0.0.1:8080", f"127.0.0.1:{ports['inference']}")
            wait_until(
                lambda: subprocess.run([sys.executable, "-c", check], capture_output=True, check=False).returncode == 0
            )
            wait_until(lambda: query_prometheus(ports["prometheus"], "fleetcast_worker_up") == ["1"])
            token, models = (tmp_path / "operator.token").read_text().strip(), f"{ports['management']}/fleet/models"
            with pytest.raises(urllib.error.HTTPError, match="401"):
                urllib.request.urlopen(f"http://127.0.0.1:{models}", timeout=PATIENCE_S)
            request = urllib.request.Request(f"http://127.0.0.1:{models}", headers={"Authorization": f"Bearer {token}"})
            with urllib.request.urlopen(request, timeout=PATIENCE_S) as reply:
                assert reply.status == 200


def make_tokens(service: Mapping[str, Any], folder: Path) -> None:
    """Run the service's command, twice: the tokens that are there are kept."""
    environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}"}
    for _ in range(2):
        subprocess.run([*service["entrypoint"], *service["command"]], cwd=folder, env=environment, check=True)
    assert (folder / "tokens.toml").read_text().count("[[tokens]]") == 2
    assert len((folder / "prometheus.token").read_text().split()) == 1


def read_healthcheck() -> str:
    """The Python of the image's healthcheck."""
    line = next(
        line
        for line in (DOCKER / "cpu.Dockerfile").read_text().splitlines()
        if line.strip().startswith('CMD ["python"')
    )
    command: list[str] = json.loads(line.strip().removeprefix("CMD "))
    return command[2]


def query_prometheus(port: int, query: str) -> list[str]:
    """The values Prometheus has for a query now."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/v1/query?query={query}", timeout=PATIENCE_S) as reply:
            return [row["value"][1] for row in json.load(reply)["data"]["result"]]
    except OSError:
        return []

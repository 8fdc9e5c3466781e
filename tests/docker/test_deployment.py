"""The files to deploy with, without a cluster: schemas, what they share with the program, and a server that runs so."""

import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from server import contract
from server.cli.main import app
from server.routes.inference import PROTOCOLS
from server.settings import Settings
from server.supervisor.supervisor import LONGEST_END_S
from tests.docker.test_images import DOCKER
from tests.e2e.models import pack_fleet
from tests.e2e.server import run_server
from tests.patience import PATIENCE_S
from tests.s3 import S3Server

KUBERNETES, KSERVE, SYSTEMD = (DOCKER / name for name in ("kubernetes", "kserve", "systemd"))
MANIFESTS = ("namespace.yaml", "server.yaml", "network.yaml")
KUBERNETES_VERSIONS = ("1.27", "1.37")  #: the oldest that the page promises, and the newest with a schema here
PORTS = {"inference": contract.INFERENCE_PORT, "management": contract.MANAGEMENT_PORT, "metrics": contract.METRICS_PORT}
IMAGE_USER = 10001  #: `USER` of the images, see test_images.py
MOST_EXPOSED = 20  #: tenths of systemd's measure from 0 to 10; the unit has 1.7 by systemd 252
GIB = 2**30
needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")


def read_documents(path: Path) -> list[dict[str, Any]]:
    """The documents of a YAML file."""
    return list(yaml.safe_load_all(path.read_text()))


def list_manifests() -> list[dict[str, Any]]:
    """What `kubectl apply -k` makes, but for the ConfigMap of the settings."""
    return [document for name in MANIFESTS for document in read_documents(KUBERNETES / name)]


def find_manifest(kind: str, name: str = "fleetcast") -> dict[str, Any]:
    """The one of this kind and name."""
    (found,) = (each for each in list_manifests() if (each["kind"], each["metadata"]["name"]) == (kind, name))
    return found


def read_pod() -> dict[str, Any]:
    """What each pod is made of."""
    pod: dict[str, Any] = find_manifest("StatefulSet")["spec"]["template"]["spec"]
    return pod


def read_environment() -> dict[str, str]:
    """`settings.env` as kustomize reads it: a name and a value a line, without quotes."""
    lines = (line.strip() for line in (KUBERNETES / "settings.env").read_text().splitlines())
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def read_runtime() -> dict[str, Any]:
    """The container of KServe's runtime."""
    (runtime,) = read_documents(KSERVE / "runtime.yaml")
    (container,) = runtime["spec"]["containers"]
    found: dict[str, Any] = container
    return found


def check_settings(monkeypatch: pytest.MonkeyPatch, folder: Path, variables: dict[str, str]) -> Settings:
    """The settings that a server makes of these variables. Raises ValidationError for one that it refuses."""
    monkeypatch.chdir(folder)  # where no fleetcast.toml is
    known = {f"FLEETCAST_{name.upper()}" for name in Settings.model_fields}
    assert variables.keys() <= known, f"there are no such settings: {variables.keys() - known}"
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return Settings()  # type: ignore[call-arg]


def check_command(arguments: list[str]) -> None:
    """Raises AssertionError unless the real command line has this command with these options."""
    done = CliRunner().invoke(app, [*arguments, "--help"])
    assert done.exit_code == 0, f"{arguments}: {done.output}"


# --- systemd ----------------------------------------------------------------------------------------------------------


def read_unit() -> dict[str, str]:
    """The unit's directives by name; of those that come twice the last."""
    lines = (SYSTEMD / "fleetcast.service").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))


def make_unit(folder: Path) -> Path:
    """The unit with a program that is on this machine, in the place of the one that it installs."""
    text = (SYSTEMD / "fleetcast.service").read_text()
    assert text.count("ExecStart=/opt/fleetcast/bin/fleetcast ") == 1
    path = folder / "fleetcast.service"
    path.write_text(text.replace("/opt/fleetcast/bin/fleetcast ", f"{sys.executable} "))
    return path


@needs_systemd
def test_systemd_understands_the_unit(tmp_path: Path) -> None:
    """Every directive is known and has a value that is allowed: nothing is said against it."""
    command = ["systemd-analyze", "verify", "--man=no", str(make_unit(tmp_path))]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE_S)
    said = [line for line in done.stderr.splitlines() if "fleetcast" in line]
    assert (done.returncode, said) == (0, [])


@needs_systemd
def test_the_unit_is_hardened(tmp_path: Path) -> None:
    """By systemd's own measure: a directive that is lost makes it more exposed."""
    flags = ["--offline=true", "--no-pager", f"--threshold={MOST_EXPOSED}"]
    command = ["systemd-analyze", "security", *flags, str(make_unit(tmp_path))]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE_S)
    assert done.returncode == 0, f"{done.stdout[-500:]}{done.stderr}"


def test_the_unit_leaves_the_server_what_it_needs() -> None:
    """Forks and Landlock for archives with code, machine code that libraries write, memory in /proc, and its time."""
    unit = read_unit()
    allowed = unit["SystemCallFilter"].split()
    assert "@system-service" in allowed
    assert {"landlock_create_ruleset", "landlock_add_rule", "landlock_restrict_self"} <= set(allowed)
    assert not {"MemoryDenyWriteExecute", "ProcSubset"} & unit.keys()
    assert int(unit["TasksMax"]) > 4 * Settings.model_fields["code_processes"].default
    assert int(unit["LimitNOFILE"].partition(":")[2]) >= 65536
    assert (unit["KillMode"], unit["OOMPolicy"]) == ("mixed", "continue")
    drain = Settings.model_fields["drain_s"].default
    assert int(unit["TimeoutStopSec"]) > drain + LONGEST_END_S


def test_the_services_command_and_settings_are_real(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The program takes the command, and the example of `fleetcast.toml` as it is and with what is commented out."""
    unit = read_unit()
    check_command(shlex.split(unit["ExecStart"])[1:])
    text = (SYSTEMD / "fleetcast.toml").read_text()
    wished = re.sub(r"^# (?=\w+ = )", "", text, flags=re.MULTILINE)
    assert len(tomllib.loads(wished)) > len(tomllib.loads(text))
    monkeypatch.chdir(tmp_path)
    for example in (text, wished):
        (tmp_path / "fleetcast.toml").write_text(example)
        settings = Settings()  # type: ignore[call-arg]
        assert str(settings.tokens) == f"{unit['WorkingDirectory']}/tokens.toml"
        assert settings.disk_cache.is_relative_to(f"/var/cache/{unit['CacheDirectory']}")


# --- Kubernetes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", KUBERNETES_VERSIONS)
def test_kubernetes_takes_the_manifests(version: str) -> None:
    """Its own schemas, which know no other fields, accept each."""
    schemas = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is missing: `make venv` brings it")
    for manifest in list_manifests():
        schemas.validate(manifest, version, strict=True)


def test_kustomization_names_every_file() -> None:
    """No manifest is left out, and the settings and the image that pods name are those it makes."""
    (made,) = read_documents(KUBERNETES / "kustomization.yaml")
    (settings,) = made["configMapGenerator"]
    (image,) = made["images"]
    (container,) = read_pod()["containers"]
    assert sorted(made["resources"]) == sorted(MANIFESTS)
    files = {path.name for path in KUBERNETES.iterdir()}
    assert files == {*made["resources"], *settings["envs"], "kustomization.yaml"}
    assert container["envFrom"][0]["configMapRef"]["name"] == settings["name"]
    assert container["image"] == image["name"]
    assert made["namespace"] == find_manifest("Namespace")["metadata"]["name"]


def test_pods_run_the_programs_command_and_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Also: no variables of services, which the server would take for settings."""
    pod = read_pod()
    (container,) = pod["containers"]
    check_command(container["args"])
    settings = check_settings(monkeypatch, tmp_path, read_environment())
    assert pod["enableServiceLinks"] is False
    assert (settings.inference_port, settings.management_port, settings.metrics_port) == tuple(PORTS.values())
    pods = [f"fleetcast-{i}.fleetcast-pods" for i in range(find_manifest("StatefulSet")["spec"]["replicas"])]
    assert settings.allowed_hosts == pods


def test_pods_have_time_to_stop(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """From the signal until all processes are gone, after the time in which the cluster learns of it."""
    pod = read_pod()
    (container,) = pod["containers"]
    program, wait = container["lifecycle"]["preStop"]["exec"]["command"]
    drain = check_settings(monkeypatch, tmp_path, read_environment()).drain_s
    assert program == "sleep"
    assert pod["terminationGracePeriodSeconds"] > int(wait) + drain + LONGEST_END_S


def test_the_disk_tier_is_a_folder_of_the_servers_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Below the volume, whose top its group may write to, so that the server would refuse it; the volume is larger."""
    settings = check_settings(monkeypatch, tmp_path, read_environment())
    (container,) = read_pod()["containers"]
    mounts = {mount["name"]: Path(mount["mountPath"]) for mount in container["volumeMounts"]}
    (claim,) = find_manifest("StatefulSet")["spec"]["volumeClaimTemplates"]
    room = int(claim["spec"]["resources"]["requests"]["storage"].removesuffix("Gi")) * GIB
    assert mounts[claim["metadata"]["name"]] in settings.disk_cache.parents
    assert settings.disk_cache_bytes < room
    assert settings.tokens == mounts["tokens"] / "tokens.toml"


def test_pods_have_no_rights() -> None:
    """The images' user, nothing of root's, a file system that is read only, and no token of the cluster's API."""
    pod = read_pod()
    (container,) = pod["containers"]
    assert pod["securityContext"]["runAsUser"] == pod["securityContext"]["fsGroup"] == IMAGE_USER
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["automountServiceAccountToken"] is False
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


def test_probes_and_ports_are_the_servers() -> None:
    """The paths are contract and routes; names of ports lead to its numbers, of the container and of both services."""
    (container,) = read_pod()["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == PORTS
    probes = {name: container[f"{name}Probe"]["httpGet"] for name in ("startup", "liveness", "readiness")}
    assert {probe["port"] for probe in probes.values()} == {"inference"}
    assert probes["startup"]["path"] == probes["liveness"]["path"] == contract.PING_PATH
    assert probes["readiness"]["path"] == contract.READY_PATH
    reached = {
        name: {port["name"]: port["port"] for port in find_manifest("Service", name)["spec"]["ports"]}
        for name in ("fleetcast", "fleetcast-pods")
    }
    assert reached["fleetcast"] == {"inference": PORTS["inference"]}
    assert reached["fleetcast-pods"] == {name: PORTS[name] for name in ("management", "metrics")}


def test_only_monitoring_and_operators_reach_their_ports() -> None:
    """The policy is for the servers' pods, and has one rule a port: with a rule more, somebody else reaches it."""
    spec = find_manifest("NetworkPolicy")["spec"]
    labels = find_manifest("StatefulSet")["spec"]["template"]["metadata"]["labels"]
    assert spec["podSelector"]["matchLabels"] == labels
    assert spec["policyTypes"] == ["Ingress"]
    rules = [(port["port"], rule["from"]) for rule in spec["ingress"] for port in rule["ports"]]
    assert rules == [
        ("inference", [{"namespaceSelector": {}}]),
        ("metrics", [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}]),
        ("management", [{"podSelector": {"matchLabels": {"fleetcast.org/role": "operator"}}}]),
    ]
    for kind in ("PodDisruptionBudget", "Service"):
        selected = find_manifest(kind)["spec"]["selector"]
        assert selected.get("matchLabels", selected) == labels


# --- KServe -----------------------------------------------------------------------------------------------------------


def test_kserves_runtime_is_this_server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its command, settings, port and probes are the program's; the service asks for what the runtime has."""
    (runtime,), (service,) = read_documents(KSERVE / "runtime.yaml"), read_documents(KSERVE / "prices.yaml")
    container, asked = read_runtime(), service["spec"]["predictor"]
    check_command(container["args"])
    settings = check_settings(monkeypatch, tmp_path, {each["name"]: each["value"] for each in container["env"]})
    assert [port["containerPort"] for port in container["ports"]] == [settings.inference_port]
    paths = {container[f"{name}Probe"]["httpGet"]["path"] for name in ("liveness", "readiness")}
    assert paths <= {route.path for protocol in PROTOCOLS.values() for route in protocol.routes}
    assert runtime["spec"]["multiModel"] is False
    assert asked["model"]["runtime"] == runtime["metadata"]["name"]
    assert asked["model"]["modelFormat"]["name"] in {each["name"] for each in runtime["spec"]["supportedModelFormats"]}
    assert asked["model"]["protocolVersion"] in runtime["spec"]["protocolVersions"]
    assert asked["terminationGracePeriodSeconds"] > settings.drain_s + LONGEST_END_S
    assert asked["enableServiceLinks"] is False


# --- a server by these files ------------------------------------------------------------------------------------------


def make_volume(folder: Path) -> Path:
    """A folder as Kubernetes mounts a volume with `fsGroup`: its group may write to it."""
    folder.mkdir()
    folder.chmod(0o2775)
    return folder


def make_token(name: str, scope: str, file: Path) -> str:
    """The secret of a new token, whose lines are added to the file."""
    command = [sys.executable, "-m", "server.cli.main", "token", name, "--scope", scope]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=PATIENCE_S)
    with file.open("a") as lines:
        lines.write(done.stdout)
    return done.stderr.rpartition(": ")[2].strip()


def move_place(value: str, moved: dict[str, Path]) -> str:
    """The value with the places of a pod in it replaced by this test's."""
    for there, here in moved.items():
        value = value.replace(there, str(here))
    return value


@pytest.mark.e2e
def test_a_server_runs_as_in_a_pod(s3: S3Server, tmp_path: Path) -> None:
    """By the pods' settings, with the volume, tokens and store of this test.

    All probes, KServe's too, succeed without a token, operators' listeners want theirs, and archives are kept on the
    volume.
    """
    store, volume, tokens = tmp_path / "store", make_volume(tmp_path / "volume"), tmp_path / "tokens.toml"
    (model,) = pack_fleet("pod", 1)
    (store / model.name).parent.mkdir(parents=True)
    (store / model.name).write_bytes(model.data)
    operator, prometheus = (make_token(*each, tokens) for each in (("operator", "manage"), ("scraper", "metrics")))
    moved = {"s3://bucket/prefix": store, "/etc/fleetcast/tokens": tmp_path, "/var/lib/fleetcast/cache": volume}
    environment = {name: move_place(value, moved) for name, value in read_environment().items()}
    containers = (*read_pod()["containers"], read_runtime())
    paths = {each[f"{name}Probe"]["httpGet"]["path"] for each in containers for name in ("liveness", "readiness")}
    with run_server(s3, tmp_path, None, environment=environment, disk_cache=None, log_format=None) as server:
        addresses = {name: url.replace("0.0.0.0", "127.0.0.1") for name, url in server.addresses.items()}
        assert {path: server.http.get(f"{server.url}{path}").status_code for path in paths} == dict.fromkeys(paths, 200)
        asked = {"metrics": (contract.METRICS_PATH, prometheus), "management": (contract.MODELS_PATH, operator)}
        for listener, (path, token) in asked.items():
            url, header = f"{addresses[listener]}{path}", {"Authorization": f"Bearer {token}"}
            assert server.http.get(url).status_code == 401
            assert server.http.get(url, headers=header).status_code == 200
        load = f"{addresses['management']}{contract.verb_path('load')}/{model.name}"
        loaded = server.http.post(load, headers={"Authorization": f"Bearer {operator}"})
        assert loaded.status_code == 200, loaded.text
        assert list((volume / "disk").iterdir())

"""`docs/deploying.md`: its commands, files, blocks and links are there, and fit the program."""

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import yaml

from server import contract
from server.settings import Settings
from server.supervisor.supervisor import LONGEST_END_S
from tests.docker.test_deployment import KSERVE, KUBERNETES, PORTS, check_command, find_manifest
from tests.docker.test_images import DOCKER, read_healthcheck

ROOT = DOCKER.parent
PAGE = ROOT / "docs/deploying.md"


def list_blocks(language: str) -> list[str]:
    """The page's blocks of code in a language."""
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(), re.DOTALL)


def list_commands() -> Iterator[list[str]]:
    """Each line of a shell block in words, up to a pipe or redirection, without `sudo` and variables."""
    for block in list_blocks("bash"):
        for line in block.splitlines():
            words = re.split(r"\s(?:\||>>?)\s", line)[0]
            found = shlex.split(words)
            while found and (found[0] in ("sudo", "export") or "=" in found[0]):
                found = found[1:]
            if found:
                yield found


def test_commands_of_the_page_exist() -> None:
    """Each `fleetcast` command has the options that it is given, and each file of the repository is there."""
    commands = list(list_commands())
    ours = [command for command in commands if Path(command[0]).name == "fleetcast"]
    for command in ours:
        check_command(command[1:])
    assert {command[1] for command in ours} >= {"serve", "token", "ls", "verify", "doctor"}
    files = {word for command in commands for word in command if word.startswith("docker/")}
    files |= set(re.findall(r"`((?:docker|docs)/[\w./-]+)`", PAGE.read_text()))
    assert not [name for name in files if not (ROOT / name).exists()]
    applied = {Path(word) for command in commands if command[0] == "kubectl" for word in command if "docker/" in word}
    assert {ROOT / path for path in applied} == {
        KUBERNETES, KUBERNETES / "namespace.yaml", KSERVE / "runtime.yaml", KSERVE / "prices.yaml",
    }  # fmt: skip


def test_links_of_the_page_lead_somewhere() -> None:
    """To pages that are there, and to headings of this one."""
    text = PAGE.read_text()
    headings = {
        re.sub(r"[^\w-]", "", h.lower().replace(" ", "-")) for h in re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    }
    assert set(re.findall(r"\]\(#([\w-]+)\)", text)) <= headings
    assert all((PAGE.parent / link).exists() for link in re.findall(r"\]\(([\w.-]+\.md)\)", text))


def test_what_the_page_has_for_ecs_and_prometheus_fits() -> None:
    """The task's command, settings, port, times and health check; the monitor finds our pods' port by its name."""
    (task,) = (json.loads(block) for block in list_blocks("json"))
    (container,) = task["containerDefinitions"]
    check_command(container["command"])
    names = {each["name"] for each in container["environment"]}
    assert names <= {f"FLEETCAST_{name.upper()}" for name in Settings.model_fields}
    assert container["portMappings"] == [{"containerPort": PORTS["inference"]}]
    assert container["stopTimeout"] > Settings.model_fields["drain_s"].default + LONGEST_END_S
    check = read_healthcheck().replace(contract.READY_PATH, contract.PING_PATH)
    assert container["healthCheck"]["command"] == ["CMD", "python", "-c", check]
    (monitor,) = (yaml.safe_load(block) for block in list_blocks("yaml"))
    pods = find_manifest("StatefulSet")["spec"]["template"]["metadata"]["labels"]
    assert monitor["spec"]["selector"]["matchLabels"] == pods
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    assert (endpoint["port"] in PORTS, endpoint["path"]) == (True, contract.METRICS_PATH)

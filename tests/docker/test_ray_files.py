"""`docker/ray` and `docs/cluster.md`, without Ray: what the files say is what the program reads."""

import re
import shlex
from typing import Any

import pytest
import yaml

from server.cluster.options import read_arguments
from server.contract import HEADER_TARGET_MODEL
from server.settings import Settings
from server.supervisor.supervisor import LONGEST_END_S
from tests.docker.test_deployment import IMAGE_USER, KUBERNETES_VERSIONS, check_command, read_documents
from tests.docker.test_images import DOCKER

RAY = DOCKER / "ray"
PAGE = DOCKER.parent / "docs/cluster.md"
TEXT, COUNT = {"type": "string"}, {"type": "integer", "minimum": 0}
PARAMETERS = {"type": "object", "additionalProperties": TEXT}
TEMPLATE = {"type": "object", "required": ["spec"]}  # pods have a schema of their own


def describe_object(fields: dict[str, Any], required: list[str]) -> dict[str, Any]:
    """The schema of an object that has these fields and no others."""
    return {"type": "object", "properties": fields, "required": required, "additionalProperties": False}


#: What KubeRay 1.7's definition of a RayService (ray.io/v1) says of the fields that the file has. The API server drops
#: what is misspelt without a word.
HEAD = describe_object({"rayStartParams": PARAMETERS, "template": TEMPLATE}, ["template"])
WORKERS = describe_object(
    {"groupName": TEXT, "replicas": COUNT, "minReplicas": COUNT, "maxReplicas": COUNT, "rayStartParams": PARAMETERS,
     "template": TEMPLATE},
    ["groupName", "minReplicas", "maxReplicas", "template"],
)  # fmt: skip
CLUSTER = describe_object(
    {"rayVersion": TEXT, "headGroupSpec": HEAD, "workerGroupSpecs": {"type": "array", "items": WORKERS}},
    ["headGroupSpec"],
)
SERVICE = describe_object({"serveConfigV2": TEXT, "rayClusterConfig": CLUSTER}, ["rayClusterConfig"])
SESSION = {"name": "RAY_SERVE_SESSION_ID_HEADER_KEY", "value": HEADER_TARGET_MODEL}


def find_arguments(config: dict[str, Any]) -> dict[str, Any]:
    """What the application of a Serve config is given."""
    (application,) = config["applications"]
    assert application["import_path"] == "server.cluster.application:build"
    arguments: dict[str, Any] = application["args"]
    return arguments


def list_pods() -> list[dict[str, Any]]:
    """The templates of the RayService's pods: the head's, then the others'."""
    _, service = read_documents(RAY / "kuberay.yaml")
    config = service["spec"]["rayClusterConfig"]
    return [config["headGroupSpec"]["template"], *(group["template"] for group in config["workerGroupSpecs"])]


@pytest.mark.parametrize("name", ["serve.yaml", "kuberay.yaml"])
def test_arguments_are_the_programs(name: str) -> None:
    """Each option and each setting is one that the program has."""
    document = read_documents(RAY / name)[-1]
    config = yaml.safe_load(document["spec"]["serveConfigV2"]) if name == "kuberay.yaml" else document
    options, scaling = read_arguments(find_arguments(config))
    assert Settings.from_wire(options.settings).store == "s3://models/prices"
    assert scaling.replicas > 1


@pytest.mark.parametrize("version", KUBERNETES_VERSIONS)
def test_kubernetes_takes_the_pods_and_the_service(version: str) -> None:
    """Kubernetes' schemas of the service and the pods know no other fields, nor does KubeRay's of what is above."""
    above = pytest.importorskip("jsonschema", reason="jsonschema is missing: `make venv` brings it")
    schemas = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is missing: `make venv` brings it")
    service, ray = read_documents(RAY / "kuberay.yaml")
    schemas.validate(service, version, strict=True)
    assert (ray["apiVersion"], ray["kind"]) == ("ray.io/v1", "RayService")
    above.validate(ray["spec"], SERVICE)
    for template in list_pods():
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": template["spec"]}
        schemas.validate(pod, version, strict=True)


def test_pods_are_rays_and_the_servers() -> None:
    """They run as nobody in particular, know the header of the target model, have the room that a replica asks for, and
    have time to drain; the service finds them.
    """
    service, ray = read_documents(RAY / "kuberay.yaml")
    options, scaling = read_arguments(find_arguments(yaml.safe_load(ray["spec"]["serveConfigV2"])))
    (group,) = ray["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    assert group["minReplicas"] <= scaling.replicas <= group["maxReplicas"]
    for template in list_pods():
        (container,) = template["spec"]["containers"]
        assert SESSION in container["env"]
        assert container["securityContext"]["runAsUser"] == IMAGE_USER
        assert template["spec"]["enableServiceLinks"] is False
    node = group["template"]
    (container,) = node["spec"]["containers"]
    settings = Settings.from_wire(options.settings)
    assert float(container["resources"]["requests"]["cpu"]) >= options.cpus
    assert node["spec"]["terminationGracePeriodSeconds"] > settings.drain_s + LONGEST_END_S
    assert service["spec"]["selector"] == node["metadata"]["labels"]
    served = {port["name"]: port["targetPort"] for port in service["spec"]["ports"]}
    assert served == {"inference": settings.inference_port, "metrics": settings.metrics_port}
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert settings.disk_cache.parent.as_posix() == mounts["cache"], "a folder of its own below the volume"
    assert settings.tokens is not None, "the metrics listener is open to other hosts"
    assert settings.tokens.parent.as_posix() == mounts["tokens"]
    assert settings.metrics_host == "0.0.0.0"
    assert settings.allowed_hosts == [service["metadata"]["name"]], "Prometheus asks by the service's name"


def test_the_page_names_what_there_is() -> None:
    """Its commands have the flags that they are given, its files are there, and so are the settings that it names."""
    text = PAGE.read_text()
    lines = [line for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    lines += re.findall(r"`(fleetcast (?:serve|cluster) --node[^`]+)`", text.replace("\n", " "))
    ours = [shlex.split(line) for line in lines if "fleetcast " in line and "pip" not in line]
    assert {words[1] for words in ours} == {"cluster", "serve"}
    for words in ours:
        check_command(words[1:])
    assert not [name for name in re.findall(r"docker/[\w./-]+\w", text) if not (DOCKER.parent / name).exists()]
    flags = {name.lstrip("-").replace("-", "_") for name in re.findall(r"`(node_\w+|nodes_file)`", text)}
    assert flags <= set(Settings.model_fields)

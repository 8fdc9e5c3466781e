"""A cluster on real Ray: raylets, Serve's controller and proxy, and replicas with whole servers, on this host.

`make test-ray` runs it. Ray costs about a gigabyte of packages and half a minute of processor time a start, so that
`make test` leaves it out.
"""

import itertools
import json
import os
import signal
import time
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from server.contract import home_weight
from server.front.nodes.membership import number_node
from server.settings import Settings
from tests.docker.test_images import DOCKER
from tests.e2e.models import Question, pack_fleet
from tests.e2e.ray_cluster import RayCluster, run_ray
from tests.e2e.server import Answer, Load, Server, upload
from tests.patience import wait_until
from tests.s3 import S3Server

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(not os.environ.get("FLEETCAST_TEST_RAY"), reason="it takes minutes: make test-ray runs it"),
]

MODELS = pack_fleet("ray", 60)
QUESTIONS = [model.question(1) for model in MODELS]
SLACK = 0.02  #: of all models that may move beside the share of a node that comes or goes
TRIES = 200


class AnyNode:
    """A client with the addresses of all nodes, as one behind a load balancer: one that refuses connections is passed.

    Every HTTP answer counts, and so does a connection that breaks once an answer has begun.
    """

    def __init__(self, folder: Path, http: httpx.Client) -> None:
        self._folder, self._turn = folder, itertools.count()
        self._http = http

    def list_addresses(self) -> list[str]:
        """Those of the newest table that a replica has written."""
        files = sorted(self._folder.glob("node-*/nodes.json"), key=lambda file: file.stat().st_mtime)
        return [node["inference"] for node in json.loads(files[-1].read_bytes())["nodes"]]

    def ask(self, question: Question, _client: Any = None) -> Answer:
        """Ask the next node in turn, and check the numbers. Raises AssertionError for a refusal or a wrong answer."""
        headers = {"X-Amzn-SageMaker-Target-Model": question.model, "Content-Type": "application/json"}
        for _ in range(TRIES):
            addresses = self.list_addresses()
            address = addresses[next(self._turn) % len(addresses)]
            try:
                reply = self._http.post(f"{address}/invocations", content=question.body, headers=headers)
            except httpx.TransportError:
                time.sleep(0.05)
                continue
            assert reply.status_code == httpx.codes.OK, f"{reply.status_code} {reply.text[:300]}"
            question.check(reply.content)
            return Answer(reply.content, reply.headers)
        raise AssertionError("no node of the table takes connections")


def count(server: Server, name: str, **labels: str) -> float:
    """The sum of a counter over its other labels."""
    wanted = labels.items()
    return sum(value for (series, found), value in server.series().items() if series == name and wanted <= found)


def count_loads(*servers: Server, **labels: str) -> float:
    """Loads that these servers have done."""
    return sum(count(server, "fleetcast_model_loading_seconds_count", **labels) for server in servers)


def find_owner(model: str, names: Iterable[str]) -> str:
    """The node that owns the model, where these are all."""
    return max(names, key=lambda name: home_weight(model, number_node(name)))


def make_options(store: str, folder: Path, **settings: Any) -> dict[str, Any]:
    """What replicas are told: small servers on this host."""
    ports = {"inference_port": 0, "management_port": 0, "metrics_port": 0}
    given = {"store": store, "device": "cpu", "disk_cache": str(folder), "drain_s": 10, "log_format": "json"}
    wire = Settings(**{**given, **ports, **settings}).to_wire()
    return {"settings": wire, "secret": "a secret of this test's nodes", "per_host": 5, "host": "127.0.0.1"}


@pytest.fixture
def ray(s3: S3Server, tmp_path: Path) -> Iterator[RayCluster]:
    """Ray with its head, which has room for four replicas."""
    with run_ray(s3, tmp_path) as cluster:
        yield cluster


def wait_for(cluster: RayCluster, count_of: int) -> dict[str, Server]:
    """The servers, once there are so many that answer."""
    found: dict[str, Server] = {}

    def look() -> bool:
        found.clear()
        found.update(cluster.list_servers())
        return len(found) == count_of

    wait_until(look, f"{count_of} replicas serve")
    return found


@pytest.mark.timeout(900)
def test_replicas_nodes_settings_and_the_head_come_and_go(
    s3: S3Server, store: str, tmp_path: Path, ray: RayCluster
) -> None:
    """Under a load that asks all nodes in turn: a replica is killed and comes back to its models, settings are rolled
    out, the cluster grows and shrinks, a node is lost, the head is lost and restarted. No answer is refused or wrong;
    a node that comes or goes moves its own share of the models, and what comes back is read from its host's disk.
    """
    upload(s3, store, MODELS)
    disk = tmp_path / "disk"
    options = make_options(f"s3://{store}", disk)
    ray.do("deploy", options=options, replicas=3)
    servers = wait_for(ray, 3)
    wait_until(lambda: _know_each_other(servers), "each front has links to all other nodes")
    client = AnyNode(disk, ray.http)
    for question in [*QUESTIONS, *QUESTIONS]:
        client.ask(question)
    assert count_loads(*servers.values()) <= len(MODELS) * (1 + SLACK) + len(servers)
    _ask_through_the_proxy(ray, servers)
    with Load(ray.wrap({"inference": ray.proxy}), QUESTIONS, ask=client.ask, clients=2) as load:
        load.more(len(MODELS))
        _kill_a_replica(ray, servers, load)
        _roll_out(ray, options, load)
        _grow_and_shrink(ray, options, load)
        _restart_the_head(ray, load)
        _lose_a_node(ray, options, load)
    problems = [outcome for outcome in load.outcomes if outcome.problem]
    assert not problems, f"{len(problems)} of {len(load.outcomes)} answers: {problems[:3]}"


@pytest.mark.timeout(900)
def test_rays_own_tools_deploy_the_file(s3: S3Server, store: str, tmp_path: Path, ray: RayCluster) -> None:
    """`serve deploy` with docker/ray/serve.yaml, whose store, secret and ports are this test's: both replicas answer
    for all models, and so does Ray's proxy. Deployed again with other settings, the nodes keep their names, and models
    come back from their disks; `serve status` says that it runs.
    """
    upload(s3, store, MODELS[:20])
    config = yaml.safe_load((DOCKER / "ray/serve.yaml").read_text())
    config["http_options"]["port"] = int(ray.proxy.rpartition(":")[2])
    (application,) = config["applications"]
    own = make_options(f"s3://{store}", tmp_path / "disk")
    settings = {"device": "cpu", "disk_cache": str(tmp_path / "disk"), "drain_s": 10, "log_format": "json"}
    ports = {"inference_port": 0, "management_port": 0, "metrics_port": 0, "host": "127.0.0.1"}
    application["args"]["settings"] |= {"store": f"s3://{store}", **settings, **ports}
    application["args"] |= {"cpus": 1.0, "per_host": 2, "secret": own["secret"], "host": "127.0.0.1"}
    file = tmp_path / "serve.yaml"
    before: dict[str, Server] = {}
    for rows in (512, 64):
        application["args"]["settings"]["max_batch_rows"] = rows
        file.write_text(yaml.safe_dump(config))
        ray.run_serve("deploy", str(file))
        wait_until(partial(_is_deployed, ray, before), "Ray runs the application")
        servers = wait_for(ray, 2)
        for server in (*servers.values(), ray.wrap({"inference": ray.proxy})):
            for question in QUESTIONS[:20]:
                assert _ask(ray, server.url, question)
        assert not before or servers.keys() == before.keys(), "the nodes have their old names"
        before = servers
    assert count_loads(*servers.values(), tier="store") == 0, "all models were on the nodes' disks"


@pytest.mark.timeout(900)
def test_the_number_of_replicas_follows_requests_that_do_not_pass_through_ray(
    s3: S3Server, store: str, tmp_path: Path, ray: RayCluster
) -> None:
    """Clients ask the nodes themselves, and Ray's proxy nothing: under their load a second replica comes, and it goes
    after they have gone. No answer is refused or wrong meanwhile.
    """
    upload(s3, store, MODELS[:20])
    options = make_options(f"s3://{store}", tmp_path / "disk")
    bounds = {"most_replicas": 2, "requests_per_replica": 0.02, "up_after_s": 1.0, "down_after_s": 1.0}
    ray.do("deploy", options=options, replicas=1, **bounds)
    wait_for(ray, 1)
    client = AnyNode(tmp_path / "disk", ray.http)
    wait_until(client.list_addresses, "the replica has the table of nodes")
    with Load(ray.wrap({"inference": ray.proxy}), QUESTIONS[:20], ask=client.ask, clients=4) as load:
        wait_for(ray, 2)
        load.more(len(MODELS))
    wait_for(ray, 1)
    assert client.ask(QUESTIONS[0])
    problems = [outcome for outcome in load.outcomes if outcome.problem]
    assert not problems, f"{len(problems)} of {len(load.outcomes)} answers: {problems[:3]}"


@pytest.mark.timeout(900)
def test_each_replica_has_a_gpu_of_its_own(s3: S3Server, store: str, tmp_path: Path) -> None:
    """A node that Ray takes for one with two GPUs, which are simulated in the workers: two replicas with one each have
    different ones, they alone are shown to their workers, and both answer right for all models. Then replicas without
    GPUs on the same node use none of them.
    """
    upload(s3, store, MODELS[:6])
    (tmp_path / "sitecustomize.py").write_text(SIMULATED)
    sizes = {"model_cache_bytes": "16MiB", "host_cache_bytes": "1MiB"}
    options = make_options(f"s3://{store}", tmp_path / "disk", **{**sizes, "device": "auto"})
    with run_ray(s3, tmp_path / "ray", str(tmp_path)) as ray:
        ray.do("add_node", cpus=2, gpus=2)
        ray.do("deploy", options={**options, "gpus": 1}, replicas=2)
        servers = wait_for(ray, 2)
        assert _list_devices(servers) == {"cuda:0", "cuda:1"}
        assert {f"cuda:{server.addresses['gpus']}" for server in servers.values()} == {"cuda:0", "cuda:1"}
        for server in servers.values():
            assert all(_ask(ray, server.url, question) for question in QUESTIONS[:6])
        ray.do("deploy", options=options, replicas=2)
        wait_until(lambda: _list_devices(wait_for(ray, 2)) == {"cpu"}, "replicas without GPUs serve")


#: Of every process: what a worker takes for its GPU is the simulated device.
SIMULATED = """
import sys
if "server.worker.main" in " ".join(sys.orig_argv):
    import torch
    from server.worker.engine import device
    from tests.server.fake_device import FakeDevice

    torch.version.cuda = "13.0"
    device.CudaDevice = lambda where, precision: FakeDevice(total_bytes=2**34)
"""


def _list_devices(servers: dict[str, Server]) -> set[str]:
    """Those of all their workers."""
    return {row["device"] for server in servers.values() for row in server.processes("worker")}


def _is_deployed(ray: RayCluster, before: dict[str, Server]) -> bool:
    """All replicas serve, none of them as it was before."""
    said = ray.run_serve("status")
    status = yaml.safe_load(said[said.index("proxies:") :])
    servers = ray.list_servers()
    fresh = {name for name, server in servers.items() if name not in before or server.url != before[name].url}
    return status["applications"]["fleetcast"]["status"] == "RUNNING" and len(fresh) == 2


def _ask(ray: RayCluster, url: str, question: Question) -> bool:
    headers = {"X-Amzn-SageMaker-Target-Model": question.model, "Content-Type": "application/json"}
    reply = ray.http.post(f"{url}/invocations", content=question.body, headers=headers)
    assert reply.status_code == httpx.codes.OK, reply.text
    question.check(reply.content)
    return True


def _know_each_other(servers: dict[str, Server]) -> bool:
    """Ray knows of a replica before the other fronts do, which meanwhile load what the new node owns."""
    for server in servers.values():
        nodes = server.http.get(f"{server.addresses['management']}/fleet/nodes").json()["nodes"]
        if {node["name"] for node in nodes if node["state"] in ("here", "linked")} != servers.keys():
            return False
    return True


def _ask_through_the_proxy(ray: RayCluster, servers: dict[str, Server]) -> None:
    """Ray's proxy takes a model to its owner by the header that SageMaker's clients send: fronts send few on, and
    not the two in three that a router without it would give them.
    """
    before = sum(count(server, "fleetcast_forwarded_requests_total") for server in servers.values())
    for question in QUESTIONS:
        headers = {"X-Amzn-SageMaker-Target-Model": question.model, "Content-Type": "application/json"}
        reply = ray.http.post(f"{ray.proxy}/invocations", content=question.body, headers=headers)
        assert reply.status_code == httpx.codes.OK, reply.text
        question.check(reply.content)
    after = sum(count(server, "fleetcast_forwarded_requests_total") for server in servers.values())
    assert after - before < len(MODELS) / 6, "Ray goes on to the next replica where one is slow to say that it has room"
    # A model in the path is no header: any replica takes it, and its front finds the owner.
    reply = ray.http.get(f"{ray.proxy}/v2/models/{MODELS[0].name}")
    assert reply.status_code == httpx.codes.OK, reply.text


def _kill_a_replica(ray: RayCluster, servers: dict[str, Server], load: Load) -> None:
    victim, *others = servers.values()
    own = victim.resident()
    before = count_loads(*others)
    os.kill(int(victim.addresses["pid"]), signal.SIGKILL)
    wait_until(lambda: len(ray.list_servers()) == 2, "Ray notices")
    load.more(2 * len(MODELS))
    assert count_loads(*others) - before <= len(own) + SLACK * len(MODELS)
    again = wait_for(ray, 3)
    assert again.keys() == servers.keys(), "the node has its old name"
    load.more(2 * len(MODELS))
    name = next(name for name in again if again[name].addresses["pid"] != servers[name].addresses["pid"])
    owned = {model.name for model in MODELS if find_owner(model.name, again) == name}
    wait_until(lambda: again[name].resident() >= owned, "the node has its old models")
    assert count_loads(again[name], tier="store") == 0
    assert count_loads(again[name], tier="disk") >= len(owned)


def _roll_out(ray: RayCluster, options: dict[str, Any], load: Load) -> None:
    options["settings"]["max_batch_rows"] = 64
    ray.do("deploy", options=options, replicas=3)
    servers = wait_for(ray, 3)
    load.more(2 * len(MODELS))
    assert count_loads(*servers.values(), tier="store") <= len(MODELS), "what is read anew is read from the disk"


def _grow_and_shrink(ray: RayCluster, options: dict[str, Any], load: Load) -> None:
    servers = ray.list_servers()
    before = count_loads(*servers.values())
    ray.do("deploy", options=options, replicas=4)
    grown = wait_for(ray, 4)
    load.more(2 * len(MODELS))
    (new,) = grown.keys() - servers.keys()
    owned = {model.name for model in MODELS if find_owner(model.name, grown) == new}
    assert len(grown[new].resident() - owned) <= SLACK * len(MODELS), "its own share, which is one in four on average"
    assert count_loads(*servers.values()) - before <= SLACK * len(MODELS), "no other model has moved"
    ray.do("deploy", options=options, replicas=3)
    wait_for(ray, 3)
    load.more(len(MODELS))


def _restart_the_head(ray: RayCluster, load: Load) -> None:
    names = ray.list_servers().keys()
    ray.do("kill_head")
    load.more(2 * len(MODELS))
    ray.do("restart_head")
    wait_until(lambda: ray.list_servers().keys() == names, "the head knows the replicas again")
    load.more(len(MODELS))


def _lose_a_node(ray: RayCluster, options: dict[str, Any], load: Load) -> None:
    ray.do("add_node")
    ray.do("deploy", options=options, replicas=5)  # of which the head has room for four
    wait_for(ray, 5)
    load.more(len(MODELS))
    ray.do("remove_node", index=0)
    load.more(2 * len(MODELS))
    wait_for(ray, 4)
    load.more(len(MODELS))

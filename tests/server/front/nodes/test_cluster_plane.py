"""The plane of all nodes: what a node's own workers cannot answer any more, another node is asked."""

import asyncio
from pathlib import Path
from typing import cast

from model_store.names import ModelName, parse_model_name
from server.cli.setting_flags import settings_from
from server.front.dataplane import BOUNDS, DataPlane
from server.front.inference import InferRequest
from server.front.nodes.cluster_plane import ClusterPlane
from server.front.worker_client import WorkerLink
from server.metrics import FrontMetrics
from tests.patience import PATIENCE_S
from tests.server.front.answering import JSON, Worker

OTHER = 7  #: the number of another node


def make_cluster(folder: Path) -> tuple[ClusterPlane, DataPlane]:
    """The plane of a node whose workers have all died, and which knows another node; and its own plane."""
    key = folder / "key"
    key.write_bytes(b"the secret of a cluster\n")
    key.chmod(0o600)
    nodes = folder / "nodes.json"
    nodes.write_text('{"nodes": []}')
    named = {"node_name": "here", "nodes_file": str(nodes), "node_key_file": str(key)}
    local = DataPlane(1000, BOUNDS)
    local.note_up(0)
    local.router.worker_down(0)
    cluster = ClusterPlane(local, settings_from({"store": str(folder), **named}), FrontMetrics())
    cluster.router.worker_up(OTHER)
    cluster.links[OTHER] = cast("WorkerLink", Worker(lambda asked: asked.body))
    return cluster, local


def find_own_model(cluster: ClusterPlane) -> ModelName:
    """A model that lives on this node."""
    names = (parse_model_name(f"{i}.mar") for i in range(99))
    return next(name for name in names if cluster.router.order(name)[0] == cluster.here)


def test_requests_of_a_node_whose_supervisor_has_died_are_asked_of_another(tmp_path: Path) -> None:
    """Those that wait for a worker of its own, and those that come while its front still answers."""

    async def scenario() -> None:
        cluster, local = make_cluster(tmp_path)
        asked = InferRequest(find_own_model(cluster), b"x", JSON, "", 1e9)
        waiting = asyncio.ensure_future(cluster.infer(asked))
        await asyncio.sleep(0)
        assert not waiting.done(), "its own workers may come back"
        local.abandon()
        assert [(await waiting).body, (await cluster.infer(asked)).body] == [b"x", b"x"]

    asyncio.run(asyncio.wait_for(scenario(), PATIENCE_S))

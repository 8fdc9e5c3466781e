"""Starts the application on a new or an existing Ray cluster, waits until it runs, and ends what it has started."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray
from ray import serve
from ray.serve.config import HTTPOptions

from server.cluster.application import DEPLOYMENT, build_application
from server.cluster.autoscaling import Scaling
from server.cluster.directory import Directory, Entry
from server.cluster.options import ReplicaOptions
from server.contract import HEADER_TARGET_MODEL

OBJECT_STORE = 100 * 2**20  #: bytes of Ray's shared memory on a host of our own: no answer passes through it
READY_S = 600.0
_LOOK_S = 0.2


class ClusterFailed(ValueError):
    """The replicas do not start; the message says why, and where Ray has more."""


@contextmanager
def run_cluster(options: ReplicaOptions, scaling: Scaling, own: dict[str, Any]) -> Iterator[Sequence[str]]:
    """The lines to show once all replicas serve. Raises ClusterFailed.

    `own`: the flags of `fleetcast cluster`. On the way out a Ray cluster that was started here ends; on an existing one
    the application is deleted, unless it is to stay (`detach`).
    """
    is_ours = not own["address"]
    _connect(options, scaling, own["address"])
    try:
        serve.start(http_options=HTTPOptions(host="127.0.0.1", port=own["ray_port"]))
        application = build_application(options, scaling)
        serve.run(application, name=own["name"], route_prefix="/")
        entries = _await_replicas(own["name"], scaling.replicas)
        yield _describe(entries, own)
        if not own["detach"]:
            serve.delete(own["name"])
    finally:
        if is_ours:
            serve.shutdown()
        ray.shutdown()


def _connect(options: ReplicaOptions, scaling: Scaling, address: str) -> None:
    if not address:
        most = max(scaling.replicas, scaling.most_replicas)
        ray.init(
            num_cpus=max(1, round(most * options.cpus + 0.49)),
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=OBJECT_STORE,
        )
        gpus, wanted = ray.cluster_resources().get("GPU", 0), scaling.replicas * options.gpus
        if gpus < wanted:
            ray.shutdown()
            raise ClusterFailed(
                f"{scaling.replicas} replicas need {wanted:g} GPUs, and Ray sees {gpus:g} on this host: compare with "
                "`nvidia-smi -L` and CUDA_VISIBLE_DEVICES, or ask for fewer"
            )
    else:
        ray.init(address=address, log_to_driver=False)


def _await_replicas(name: str, count: int) -> list[Entry]:
    """The replicas that have said where they serve, as soon as there are so many."""
    directory, until = Directory(name), time.monotonic() + READY_S
    while len(found := directory.list_living()) < count:
        status = serve.status().applications.get(name)
        if status is not None and status.status in ("DEPLOY_FAILED", "UNHEALTHY"):
            why = status.deployments[DEPLOYMENT].message if DEPLOYMENT in status.deployments else status.message
            raise ClusterFailed(f"the replicas do not start: {why[-1500:]}")
        if time.monotonic() > until:
            raise ClusterFailed(f"{len(found)} of {count} replicas serve after {READY_S:g} s; `ray status` says more")
        time.sleep(_LOOK_S)
    return found


def _describe(entries: Sequence[Entry], own: dict[str, Any]) -> list[str]:
    lines = [f"fleetcast   {len(entries)} replicas of {own['name']} on Ray {ray.__version__}"]
    for entry in entries:
        node = entry.node
        gpus = f", GPU {', '.join(entry.gpus)}" if entry.gpus else ""
        lines.append(
            f"{node.name} {node.inference}/invocations, management {node.management}, metrics {node.metrics}{gpus}"
        )
    lines.append(f"any of them answers for all models, named by {HEADER_TARGET_MODEL}")
    lines.append(f"ray proxy   http://127.0.0.1:{own['ray_port']}/invocations")
    lines.append("ready       Ctrl-C or SIGTERM drains and stops" if not own["detach"] else "ready       it goes on")
    return lines

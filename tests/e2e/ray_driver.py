"""Several Ray nodes on this host, as a test says by lines of JSON on standard input; it answers by one line each.

It runs in an environment with Ray, see `tests.e2e.ray_cluster`. Its processes end with it.
"""

import json
import os
import sys
from typing import Any

import ray
from ray import serve
from ray.cluster_utils import Cluster

from server.cluster.application import build_application
from server.cluster.autoscaling import Scaling
from server.cluster.directory import Directory
from server.cluster.options import parse_options

NAME = "fleetcast"
STORE = 80 * 2**20
HEAD_CPUS = 4  #: for as many replicas
STARTS = 3  #: a raylet ends itself where its agents take longer than 15 s to start, as on a busy machine


def describe_node(cpus: int, gpus: int = 0) -> dict[str, Any]:
    """A small node."""
    return {"num_cpus": cpus, "num_gpus": gpus, "object_store_memory": STORE, "include_dashboard": False}


class Driver:
    """The cluster: a head, and nodes that come and go."""

    def __init__(self) -> None:
        head = describe_node(HEAD_CPUS)
        if port := os.environ.get("RAY_DASHBOARD_PORT"):  # through which Ray's own command line deploys
            head |= {"include_dashboard": True, "dashboard_host": "127.0.0.1", "dashboard_port": int(port)}
        self._cluster = Cluster(initialize_head=True, connect=False, head_node_args=head)
        self._nodes: list[Any] = []
        ray.init(address=self._cluster.address, log_to_driver=False)
        serve.start(http_options={"host": "127.0.0.1", "port": int(os.environ["RAY_PORT"])})

    def add_node(self, cpus: int = 1, gpus: int = 0) -> None:
        """One more node, with room for so many replicas. Ray takes our word for GPUs."""
        for left in reversed(range(STARTS)):
            try:
                self._nodes.append(self._cluster.add_node(**describe_node(cpus, gpus)))
            except Exception:  # Ray raises no other
                if not left:
                    raise
            else:
                return

    def remove_node(self, index: int) -> None:
        """A node ends with all that runs on it."""
        self._cluster.remove_node(self._nodes.pop(index), allow_graceful=False)

    def deploy(self, options: dict[str, Any], replicas: int, **scaling: Any) -> None:
        """Deploy, or deploy anew, and wait until Ray says that it runs."""
        serve.run(build_application(parse_options(options), Scaling(replicas, **scaling)), name=NAME)

    def list_nodes(self) -> list[dict[str, Any]]:
        """The replicas that live, each with its process and the Ray node that it is on."""
        return [
            {
                "name": entry.node.name,
                "inference": entry.node.inference,
                "metrics": f"http://{entry.node.metrics}",
                "management": entry.node.management,
                "pid": entry.pid,
                "gpus": ",".join(entry.gpus),
            }
            for entry in Directory(NAME).list_living()
        ]

    def kill_head(self) -> None:
        """The head's process with the cluster's state ends."""
        self._cluster.head_node.kill_gcs_server(check_alive=False)

    def restart_head(self) -> None:
        """It starts again, with what it has kept."""
        self._cluster.head_node.start_gcs_server()

    def end(self) -> None:
        """All of it ends."""
        serve.delete(NAME)
        serve.shutdown()
        ray.shutdown()
        self._cluster.shutdown()


def say(answer: dict[str, Any]) -> None:
    """One line for the test."""
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    driver = Driver()
    say({"ready": True})
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            answer = {"answer": getattr(driver, asked.pop("do"))(**asked)}
        except Exception as error:  # the test judges it
            answer = {"error": repr(error)}
        say(answer)
    driver.end()

"""Nodes of a cluster: a model lives on one of them, whichever is asked; a node ends, and its models alone move."""

import os
import signal
from pathlib import Path

import pytest

from tests.e2e.models import pack_fleet
from tests.e2e.nodes import Nodes, run_nodes
from tests.e2e.server import Load, Server, upload
from tests.patience import wait_until
from tests.s3 import S3Server

pytestmark = pytest.mark.e2e

MODELS = pack_fleet("node", 48)
QUESTIONS = [model.question(1) for model in MODELS]
NAMES = ("a", "b", "c")


def count(server: Server, name: str) -> float:
    """The sum of a counter over its labels."""
    return sum(value for (series, _), value in server.series().items() if series == name)


def count_loads(nodes: Nodes, *names: str) -> float:
    """The loads that these nodes have done."""
    return sum(count(nodes.servers[name], "fleetcast_model_loading_seconds_count") for name in names)


def ask_all(nodes: Nodes, name: str) -> None:
    """Ask each model through one node, and check the numbers."""
    for question in QUESTIONS:
        nodes.servers[name].ask(question)


def test_each_model_lives_on_one_node_and_a_node_that_is_killed_moves_only_its_own(
    s3: S3Server, store: str, tmp_path: Path
) -> None:
    """All nodes answer for all models, each of which is loaded once in the cluster. One node is killed under load: no
    answer is lost or wrong at the others, which load its models and no more.
    """
    upload(s3, store, MODELS)
    with run_nodes(s3, tmp_path, f"s3://{store}", NAMES) as nodes:
        wait_until(lambda: _are_linked(nodes), "the nodes forward to each other")
        settled = count_loads(nodes, *NAMES)
        for name in NAMES:
            ask_all(nodes, name)
        assert count_loads(nodes, *NAMES) - settled <= len(MODELS)
        first = nodes.servers["a"]
        assert count(first, "fleetcast_forwarded_requests_total") >= len(MODELS) / 3
        own = {model for model, holders in nodes.holders().items() if "c" in holders}
        before = count_loads(nodes, "a", "b")
        with Load(first, QUESTIONS) as load:
            load.more(20)
            os.kill(nodes.servers["c"].process.pid, signal.SIGKILL)
            nodes.servers["c"].exit_code = -signal.SIGKILL
            load.more(3 * len(MODELS))
        assert {outcome.problem for outcome in load.outcomes} == {""}
        assert 0 < len(own) < len(MODELS)
        assert count_loads(nodes, "a", "b") - before <= len(own)


def _are_linked(nodes: Nodes) -> bool:
    ask_all(nodes, "a")
    ask_all(nodes, "b")
    forwarded = [count(nodes.servers[name], "fleetcast_forwarded_requests_total") for name in ("a", "b")]
    return min(forwarded) > len(MODELS) / 3

"""What a replica is told: what it may say, and what becomes of it in each place of a host."""

from typing import Any

import pytest

from server.cluster.autoscaling import Scaling
from server.cluster.options import ReplicaOptions, parse_options, parse_scaling, read_arguments
from server.settings import Settings

GIB = 2**30


def make_options(**given: Any) -> ReplicaOptions:
    """Options of a small server."""
    settings = {"store": "/models", **given.pop("settings", {})}
    return ReplicaOptions(Settings(**settings).to_wire(), "a secret of sixteen", **given)


def test_the_first_replica_of_a_host_has_the_ports_and_all_share_its_memory() -> None:
    """The second one has free ports; each takes its part of the memory for models unless that is set."""
    options = make_options(per_host=2, cpus=3.5)
    first, second = (Settings.from_wire(options.settings_of(slot, "/disk", "10.0.0.1", 10 * GIB)) for slot in (0, 1))
    assert (first.inference_port, first.management_port, first.metrics_port) == (8080, 8081, 8082)
    assert (second.inference_port, second.management_port, second.metrics_port) == (0, 0, 0)
    assert first.model_cache_bytes == second.model_cache_bytes == 2 * GIB
    assert (first.workers, first.node_host, str(first.disk_cache)) == (3, "10.0.0.1", "/disk")
    alone = make_options(cpus=0.5)
    assert alone.settings_of(0, "/disk", "10.0.0.1", 10 * GIB)["model_cache_bytes"] == 0
    assert alone.settings_of(0, "/disk", "10.0.0.1", 10 * GIB)["workers"] == 1
    set_by_hand = make_options(per_host=2, settings={"model_cache_bytes": GIB, "workers": 5})
    kept = set_by_hand.settings_of(0, "/disk", "10.0.0.1", 10 * GIB)
    assert (kept["model_cache_bytes"], kept["workers"]) == (GIB, 5)
    on_gpus = make_options(gpus=2.0)
    assert on_gpus.settings_of(0, "/disk", "10.0.0.1", 10 * GIB)["workers"] == 0, "one per GPU"


def test_replicas_have_the_gpus_that_ray_gave_them_or_none() -> None:
    """Also where they would see some. Replicas of one host share the memory in front of their GPUs."""
    without = make_options().settings_of(0, "/disk", "10.0.0.1", 10 * GIB)
    assert without["device"] == "cpu"
    one = make_options(gpus=1.0).settings_of(0, "/disk", "10.0.0.1", 10 * GIB)
    assert (one["device"], one.get("host_cache_bytes")) == ("cuda", None)
    two = make_options(gpus=1.0, per_host=2).settings_of(1, "/disk", "10.0.0.1", 10 * GIB)
    assert (two["device"], two["host_cache_bytes"]) == ("cuda", GIB // 2)
    by_hand = make_options(gpus=1.0, per_host=2, settings={"host_cache_bytes": 0})
    assert by_hand.settings_of(1, "/disk", "10.0.0.1", 10 * GIB)["host_cache_bytes"] == 0


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"secret": "short"}, "fewer than 16"),
        ({"gpus": 0.5}, "whole GPUs"),
        ({"cpu": 1}, "cpu"),
        ({"gpus": 1, "settings": {"store": "/models", "device": "cpu"}}, "serve from the CPU"),
        ({"settings": {"store": "/models", "device": "cuda"}}, "replicas have no GPU"),
        ({"replicas": 0}, "1 or more"),
        ({"replicas": "two"}, "int"),
        ({"requests_per_replica": 0}, "more than 0"),
        ({"down_after_s": -1}, "less than 0"),
        ({"settings": {"store": "/models", "stores": 1}}, "stores"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], why: str) -> None:
    """The message has the name, or says what is wrong."""
    good = {"secret": "a secret of sixteen", "settings": {"store": "/models"}, "replicas": 2}
    assert read_arguments(good)[1] == Scaling(replicas=2)
    with pytest.raises(ValueError, match=why):
        read_arguments({**good, **arguments})


def test_options_survive_the_way_through_ray() -> None:
    """As plain values and back."""
    options = make_options(per_host=3, host="10.0.0.1")
    assert parse_options(options.to_config()) == options


def test_the_numbers_of_replicas_have_defaults() -> None:
    """One replica, and Ray changes nothing."""
    assert parse_scaling({}) == Scaling(replicas=1, most_replicas=0)
    assert parse_scaling({"most_replicas": 4, "requests_per_replica": 8}).requests_per_replica == 8.0

"""How many replicas are wanted, and what a replica reports: the requests under way, direct ones too."""

from types import SimpleNamespace
from typing import Any

import pytest

from server.cluster.autoscaling import UNDER_WAY, MeanUnderWay, count_wanted


def make_context(reported: dict[str, float], of_ray: float, replicas: int = 2) -> Any:
    """What Ray gives a policy, as far as ours reads it: 10 requests for each replica."""
    return SimpleNamespace(
        current_num_replicas=replicas,
        target_num_replicas=3,
        aggregated_metrics={UNDER_WAY: reported},
        total_num_requests=of_ray,
        config=SimpleNamespace(get_target_ongoing_requests=lambda: 10.0),
    )


@pytest.mark.parametrize(
    ("reported", "of_ray", "wanted"),
    [
        ({"a": 30.0, "b": 15.0}, 0.0, 4.5),  # all of it direct
        ({"a": 15.0, "b": 15.0}, 30.0, 3.0),  # all of it by Ray's proxy: counted once
        ({"a": 1.0}, 60.0, 6.0),  # requests wait in Ray's proxy
        ({}, 5.0, 0.5),  # no replica has reported yet
    ],
)
def test_wanted_are_replicas_for_the_larger_count(reported: dict[str, float], of_ray: float, wanted: float) -> None:
    """What came through Ray's proxy is in both counts."""
    assert count_wanted(make_context(reported, of_ray)) == (wanted, {})


def test_without_replicas_and_without_reports_nothing_is_changed() -> None:
    """Ray asks the policy also then."""
    assert count_wanted(make_context({}, 50.0, replicas=0)) == (3, {})
    context = make_context({}, 20.0)
    context.aggregated_metrics = None
    assert count_wanted(context) == (2.0, {})


def test_the_mean_is_the_seconds_that_requests_took_each_second() -> None:
    """Ten of half a second within two seconds are 2.5 at a time. A server that began anew says nothing once."""
    mean = MeanUnderWay()
    assert mean.look(100.0, 50.0) is None
    assert mean.look(105.0, 52.0) == 2.5
    assert mean.look(105.0, 54.0) == 0.0
    assert mean.look(1.0, 56.0) is None
    assert mean.look(3.0, 57.0) == 2.0
    assert mean.look(4.0, 57.0) is None, "the same moment"

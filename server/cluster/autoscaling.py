"""How many replicas there are to be, by the requests that all fronts have under way.

Ray counts the requests that its own proxies and handles have under way. What clients ask fronts directly is invisible
there, so each replica reports what its front has, and the policy, in Ray's controller, takes the larger of both counts.
A request that came through Ray's proxy is in both. The front that the client asked counts it, whoever answers.
"""

from typing import Any

from msgspec import Struct

UNDER_WAY = "fleetcast_requests_under_way"  #: key of `record_autoscaling_stats`
POLICY = "server.cluster.autoscaling:count_wanted"


class Scaling(Struct, frozen=True):
    """Between which numbers Ray moves, and when. `most_replicas` of no more than `replicas`: it does not."""

    replicas: int = 1
    most_replicas: int = 0
    requests_per_replica: float = 64.0  #: under way, by which the number is chosen
    up_after_s: float = 30.0  #: for so long more are wanted before there are more
    down_after_s: float = 600.0

    def check(self) -> None:
        """Raises ValueError that says what is wrong."""
        if self.replicas < 1:
            raise ValueError("replicas must be 1 or more")
        if self.requests_per_replica <= 0:
            raise ValueError("requests_per_replica must be more than 0")
        if self.up_after_s < 0 or self.down_after_s < 0:
            raise ValueError("up_after_s and down_after_s must not be less than 0")


def count_wanted(context: Any) -> tuple[float, dict[str, Any]]:
    """The policy: so many replicas that each has `target_ongoing_requests`. Ray applies its bounds and delays to it.

    `context`: Ray's AutoscalingContext.
    """
    if context.current_num_replicas == 0:
        return context.target_num_replicas, {}
    reported = (context.aggregated_metrics or {}).get(UNDER_WAY, {})
    under_way = max(sum(reported.values()), context.total_num_requests)
    return under_way / context.config.get_target_ongoing_requests(), {}


class MeanUnderWay:
    """The mean number of requests under way between two looks: the seconds that requests took, each second.

    That is Little's law (1961); what is under way at the moment of a look would say nothing of a tick between two.
    """

    def __init__(self) -> None:
        self._seconds, self._at = 0.0, 0.0

    def __repr__(self) -> str:
        return f"<MeanUnderWay of {self._seconds:.1f} s of requests>"

    def look(self, seconds: float, at: float) -> float | None:
        """`seconds`: what all requests until `at` took. None at the first look, and where the counter began anew."""
        took, passed, is_first = seconds - self._seconds, at - self._at, self._at == 0.0
        self._seconds, self._at = seconds, at
        return took / passed if took >= 0 and passed > 0 and not is_first else None

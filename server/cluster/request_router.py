"""Ray's request router that knows whose model is whose: a request that names its model goes straight to its owner.

Runs in Ray's proxies and handles. Ray takes the name from the header that RAY_SERVE_SESSION_ID_HEADER_KEY names, which
`fleetcast cluster` sets to the target model's, so that clients change nothing. Other requests go to any replica, whose
front sends them on. Ranks are those of rendezvous hashing, as all fronts have them.
"""

from typing import Any

from ray.serve.experimental.consistent_hash_router import ConsistentHashRouter

from server.contract import home_weight
from server.front.nodes.membership import number_node

NODE = "node"  #: of a replica's routing stats: the name of the node that it is


class OwnerRouter(ConsistentHashRouter):  # type: ignore[misc]  # Ray has no types
    """See the module."""

    def _lookup_ranked_replicas(self, routing_key: str) -> list[Any]:
        """The model's owner and the next ones in its order; replicas that have not said who they are come last."""
        numbers = {
            ident: number_node(replica.routing_stats[NODE])
            for ident, replica in self._replicas.items()
            if replica.routing_stats.get(NODE)
        }
        known = sorted(numbers, key=lambda ident: home_weight(routing_key, numbers[ident]), reverse=True)
        unknown = [ident for ident in super()._lookup_ranked_replicas(routing_key) if ident not in numbers]
        return [*known[: 1 + self._num_fallback_replicas], *unknown]

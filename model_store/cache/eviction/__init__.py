"""Who goes first when room is needed: one policy a file, all behind one interface, by name. Pure, without chance.

A policy ranks models within a *group*, whose members can take each other's place: a family, or None for all singles. It
is told what happens to those that may be chosen; `model_store.cache.cache.Cache` asks it for an order, goes through
that for ones without a lease, and decides between groups by `worth`. Each call takes O(log n) amortised, and what a
policy remembers of models that are not here is bounded.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

from model_store.cache.eviction.due import Due
from model_store.cache.eviction.lfu import Lfu
from model_store.cache.eviction.lru import Lru
from model_store.cache.eviction.s3fifo import S3Fifo
from model_store.cache.eviction.sieve import Sieve
from model_store.names import ModelName


class Policy(Protocol):
    """The one interface; `now` is in seconds and never falls. Of pinned models a policy is not told."""

    def enter(self, model: ModelName, group: str | None, now: float, *, asked: bool) -> None:
        """It may be chosen from now on. `asked`: a request is why; else a swap, an end of a pin, or foresight."""

    def hit(self, model: ModelName, now: float) -> None:
        """A request for a model that has entered."""

    def foresee(self, model: ModelName, now: float) -> None:
        """A model that has entered is about to be asked: it is to stay, as far as the policy does not know better."""

    def leave(self, model: ModelName) -> None:
        """It may not be chosen any more: evicted, unloaded or pinned. Of no effect for one that has not entered."""

    def victims(self, group: str | None) -> Iterator[ModelName]:
        """Every member of the group once, the first to go first. Stop before you tell the policy anything else."""

    def worth(self, model: ModelName) -> float:
        """About how often it is asked, above 0: what is lost with it, which adds up and compares between groups. Of a
        model that is not here, what it would be; inf where the policy expects nothing of it.
        """


POLICIES: Mapping[str, Callable[[], Policy]] = {"lru": Lru, "sieve": Sieve, "s3fifo": S3Fifo, "lfu": Lfu, "due": Due}


def policy_named(name: str) -> Policy:
    """A new policy that knows nothing yet, for one cache. Raises ValueError for a name that there is not."""
    if name not in POLICIES:
        raise ValueError(f"there is no eviction policy {name!r}: choose one of {', '.join(POLICIES)}")
    return POLICIES[name]()

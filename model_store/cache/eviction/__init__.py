"""Eviction policies: one a file, behind one interface, found by name. Pure and deterministic.

A policy ranks models within a *group*, whose members can replace each other: a family, or None for all singles. It is
told of every event of the models that it ranks; `model_store.cache.cache.Cache` asks it for an order, takes the first
models without a lease, and compares groups by `worth`. Each call takes O(log n) amortised, and the memory for models
that are not resident is bounded.
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
    """The interface of all policies. `now` is in seconds and never decreases. Pinned models are not ranked."""

    def enter(self, model: ModelName, group: str | None, now: float, *, asked: bool) -> None:
        """Rank the model from now on. `asked`: because of a request; else of a swap, an unpin, or a prefetch."""

    def hit(self, model: ModelName, now: float) -> None:
        """Record a request for a ranked model."""

    def foresee(self, model: ModelName, now: float) -> None:
        """Keep a ranked model that a request is expected for, unless the policy has a better prediction."""

    def leave(self, model: ModelName) -> None:
        """Stop ranking the model: it was evicted, unloaded or pinned. No-op for a model that is not ranked."""

    def victims(self, group: str | None) -> Iterator[ModelName]:
        """Every member of the group once, the first to evict first.

        INVARIANT: the caller calls no other method of the policy while it iterates.
        """

    def worth(self, model: ModelName) -> float:
        """An estimate above 0 of how often the model is requested: what its eviction costs.

        Values can be added and compared between groups. For a model that is not resident it is the value that it would
        have; inf where the policy has no estimate.
        """


POLICIES: Mapping[str, Callable[[], Policy]] = {"lru": Lru, "sieve": Sieve, "s3fifo": S3Fifo, "lfu": Lfu, "due": Due}


def make_policy(name: str) -> Policy:
    """A new policy for one cache. Raises ValueError for an unknown name."""
    if name not in POLICIES:
        raise ValueError(f"there is no eviction policy {name!r}: choose one of {', '.join(POLICIES)}")
    return POLICIES[name]()

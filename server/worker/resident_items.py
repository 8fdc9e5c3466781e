"""Accepts the items of a call for many models whose models are resident, in one pass over all. On the step thread.

It does what `StepLoop.submit` does with each of them: an item is admitted, leased, counted and queued by itself. What
all items of a call share is looked at once. Whatever is not as usual is left to `submit`, which also words refusals.
"""

from collections.abc import Sequence
from typing import Any, cast

from model_store.names import ModelName
from server.ipc.frames import CacheResult, Request, Tier
from server.metrics import WorkerMetrics
from server.worker.prefetch.prefetcher import Prefetcher
from server.worker.quarantine import Quarantine
from server.worker.resident_models import ResidentModels
from server.worker.scheduler import Job, Scheduler


class ResidentItems:
    """See the module."""

    def __init__(
        self,
        residents: ResidentModels,
        scheduler: Scheduler,
        metrics: WorkerMetrics,
        foresight: Prefetcher | None,
        quarantine: Quarantine,
    ) -> None:
        self._residents, self._scheduler, self._metrics = residents, scheduler, metrics
        self._foresight, self._quarantine = foresight, quarantine

    def __repr__(self) -> str:
        """For example `<ResidentItems of <Scheduler ...>>`."""
        return f"<ResidentItems of {self._scheduler!r}>"

    def submit(self, requests: Sequence[Request], origin: Any, now: float) -> list[Job | None]:
        """The jobs of those that are queued to run now; None for those that are left to `StepLoop.submit`.

        `requests`: of one call, so that they share the client, the deadline and when they arrived.
        """
        found: list[Job | None] = [None] * len(requests)
        first = requests[0]
        if first.alone or self._residents.unproven:
            return found
        places, models = self._select(requests)
        if not places or not self._scheduler.admit_all(models):
            return found
        if self._foresight is not None:
            self._foresight.rhythms.record_requests(models, now)
        arrived, deadline = min(now, first.arrived_ns / 1e9) or now, first.deadline_ns / 1e9
        groups: dict[str, list[Job]] = {}
        for place, slot in zip(places, self._residents.cache.lease_all(models, now), strict=True):
            job = Job(
                requests[place], slot.model, origin, arrived, deadline, CacheResult.HIT, Tier.NONE, slot,
                accepted=now, together=origin,
            )  # fmt: skip
            found[place] = job
            groups.setdefault(slot.group, []).append(job)
        self._metrics.hits.inc(len(places))
        for group, jobs in groups.items():
            self._scheduler.add_all_ready(group, first.client, jobs)
        return found

    def _select(self, requests: Sequence[Request]) -> tuple[list[int], list[ModelName]]:
        """The places and models of those that are as usual: resident, and nothing else has to be noted of them."""
        places, models, get, quarantined = (
            list[int](),
            list[ModelName](),
            self._residents.cache.get,
            self._quarantine.reasons,
        )
        expected = set[ModelName]() if self._foresight is None else self._foresight.brought | self._foresight.loading
        asked = cast("list[ModelName]", [request.model for request in requests])
        for place, model in enumerate(asked):
            if get(model) is not None and model not in quarantined and model not in expected:
                places.append(place)
                models.append(model)
        return places, models

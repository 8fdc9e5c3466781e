"""What names stand for that are not simply their archives: aliases, and models that are rolled back. Runs in a front.

The supervisor keeps the table (`server.ipc.operations.SetReleases`). A request for such a name goes to one of its arms:
an archive, or a version of it, which a worker holds beside others as a model of its own.
"""

import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from hashlib import blake2b

from msgspec.structs import replace

from model_store.names import ModelName, split_version
from server.access.tokens import Token
from server.errors import Refused
from server.front.auth.permissions import PermittedPlane
from server.front.inference import InferRequest, InferResponse, RefusedByWorker
from server.front.inference_plane import InferencePlane, PlaneInFront
from server.ipc.operations import ActualsReply, ObservedPrices, ReleaseArm
from server.metrics import FrontMetrics, ReleaseSeries

MOST_FOLLOWED = 4  #: versions of a name that follows the store which have series at a time
UNKNOWN = "unknown"  #: the version of such a name before its first answer


class Arm:
    """One arm. `below`: the upper end of its part of the range from 0 to 1; `version`: see ReleaseArm."""

    def __init__(self, arm: ReleaseArm, below: float) -> None:
        self.model, self.version, self.below = ModelName(arm.model), arm.version, below
        self.last = UNKNOWN  #: the version of the last answer

    def __repr__(self) -> str:
        """For example `<Arm au/nsw1.mar below 0.1>`."""
        return f"<Arm {self.model} below {self.below:g}>"


class Route:
    """The arms of one name, and the series of its versions."""

    def __init__(self, name: str, arms: Sequence[ReleaseArm], metrics: FrontMetrics) -> None:
        self._name, self._metrics = name, metrics
        self._series: OrderedDict[str, ReleaseSeries] = OrderedDict()
        self._arms: tuple[Arm, ...] = ()
        self._closed = False
        self.follow(arms)

    def __repr__(self) -> str:
        """For example `<Route of nsw1@stable, 2 arms, 3 versions counted>`."""
        return f"<Route of {self._name}, {len(self._arms)} arms, {len(self._series)} versions counted>"

    @property
    def arms(self) -> Sequence[Arm]:
        """What the name stands for."""
        return self._arms

    def follow(self, arms: Sequence[ReleaseArm]) -> None:
        """Take these arms for those before. Versions that both have count on, and those that an arm has followed."""
        shares, before = [arm.share for arm in arms], {arm.model: arm for arm in self._arms}
        self._arms = tuple(Arm(arm, sum(shares[: i + 1])) for i, arm in enumerate(arms))
        for arm in self._arms:
            arm.last = before[arm.model].last if arm.model in before else UNKNOWN
        self._most = len(arms) + MOST_FOLLOWED
        follows = any(not arm.version for arm in self._arms)
        wanted, named = {arm.version or arm.last for arm in self._arms}, {arm.version for arm in before.values()}
        for version in list(self._series):
            if version not in wanted and (version in named or not follows):
                self._drop(version)

    def choose(self, request_id: bytes) -> Arm:
        """The arm for a request. The same id gets the same arm again."""
        if len(self._arms) == 1:
            return self._arms[0]
        drawn = int.from_bytes(blake2b(request_id, digest_size=4, key=self._name.encode()[:64]).digest()) / 2**32
        return next((arm for arm in self._arms if drawn < arm.below), self._arms[-1])

    def count(self, arm: Arm, version: str, seconds: float | None) -> None:
        """Count a request that this version answered after so many seconds; None: it failed."""
        arm.last = version or arm.last
        counted = arm.version or arm.last
        series = self._series.get(counted) or self._bind(arm, counted)
        if series is None:
            return
        if seconds is None:
            series.failed.inc()
        else:
            series.ok.inc()
            series.seconds.observe(seconds)

    def drop_series(self) -> None:
        """Remove all series, for good: the name is its archive's again, or nothing's."""
        self._closed = True
        for version in list(self._series):
            self._drop(version)

    def _bind(self, arm: Arm, version: str) -> ReleaseSeries | None:
        """The series of an arm's version. Of those that followed the store before, the oldest are removed.

        None where the request was under way when its arm left the table: nobody would remove the series again.
        """
        if self._closed or arm.version not in {each.version for each in self._arms}:
            return None
        held = {arm.version for arm in self._arms}
        followed = [each for each in self._series if each not in held]
        if len(self._series) >= self._most and followed:
            self._drop(followed[0])
        series = self._series[version] = self._metrics.bind_release(self._name, version)
        return series

    def _drop(self, version: str) -> None:
        del self._series[version]
        self._metrics.drop_release(self._name, version)


class Releases:
    """The table as this front has it. `routes` is empty where every name is its archive's."""

    def __init__(self, metrics: FrontMetrics) -> None:
        self.routes: dict[str, Route] = {}
        self._metrics = metrics

    def __repr__(self) -> str:
        """For example `<Releases of 3 names>`."""
        return f"<Releases of {len(self.routes)} names>"

    def replace(self, table: Mapping[str, Sequence[ReleaseArm]]) -> None:
        """Take the supervisor's table for the one before."""
        for name in self.routes.keys() - table.keys():
            self.routes.pop(name).drop_series()
        for name, arms in table.items():
            if name in self.routes:
                self.routes[name].follow(arms)
            else:
                self.routes[name] = Route(name, arms, self._metrics)


class ReleasedPlane(PlaneInFront):
    """The data plane with the table's names in front of it."""

    def __init__(self, plane: InferencePlane, releases: Releases) -> None:
        super().__init__(plane)
        self._releases = releases

    def __repr__(self) -> str:
        """For example `<ReleasedPlane <Releases of 3 names> over <DataPlane ...>>`."""
        return f"<ReleasedPlane {self._releases!r} over {self._plane!r}>"

    async def infer(self, request: InferRequest) -> InferResponse:
        """The answer of the arm that the request gets, whose archive it names. Raises what the plane raises."""
        route = self._releases.routes.get(request.model)
        if route is None:
            return await self._plane.infer(request)
        arm, started = route.choose(request.request_id), time.monotonic()
        try:
            response = await self._plane.infer(replace(request, model=arm.model))
        except Refused as refused:
            route.count(arm, refused.stats.version if isinstance(refused, RefusedByWorker) else "", None)
            raise
        route.count(arm, response.stats.version, time.monotonic() - started)
        archive, _ = split_version(arm.model)
        return replace(response, stats=replace(response.stats, archive=archive))

    def select_together(self, models: Sequence[ModelName]) -> list[bool]:
        """Say which of these models can be asked together: an alias chooses its arm alone."""
        found = self._plane.select_together(models)
        return [can and model not in self._releases.routes for can, model in zip(found, models, strict=True)]

    async def record_actuals(self, items: Sequence[ObservedPrices], deadline: float) -> ActualsReply:
        """Record observed prices of what names stand for: each archive of an alias gets them once, whichever versions
        its arms have. Raises what the plane raises.

        The counts of an item are those of the archive that paired most. Of several archives one may lack the product.
        """
        spread = [self._spread(item) for item in items]
        reply = await self._plane.record_actuals([each for arms in spread for each in arms], deadline)
        counts = iter(reply.counts)
        best = [max((next(counts) for _ in arms), key=lambda each: (each.paired, each.repeated)) for arms in spread]
        return replace(reply, counts=best)

    def _spread(self, item: ObservedPrices) -> list[ObservedPrices]:
        archives = self._list_archives(item.model)
        strict = item.strict and len(archives) == 1
        return [replace(item, model=archive, strict=strict) for archive in archives]

    def _list_archives(self, model: str) -> list[str]:
        route = self._releases.routes.get(model)
        return [model] if route is None else list(dict.fromkeys(split_version(arm.model)[0] for arm in route.arms))


def make_plane(plane: InferencePlane, token: Token | None, releases: Releases) -> InferencePlane:
    """The data plane for one request. INVARIANT: a token must allow an alias and also what it stands for."""
    if releases.routes:
        plane = ReleasedPlane(plane if token is None else PermittedPlane(plane, token), releases)
    return plane if token is None else PermittedPlane(plane, token)

"""What a dialect has of the data plane, and what may stand in front of it. Runs in a front."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import msgspec

from model_store.names import ModelName
from server.errors import Refused, Situation
from server.front.background import BackgroundJobs
from server.front.finished_jobs import FinishedJobs
from server.front.inference import InferRequest, InferResponse, TogetherAnswer, TogetherRequest
from server.front.registrations import Registrations
from server.ipc.operations import (
    ActualsReply,
    KnownModel,
    ListKnownModels,
    LoadForClient,
    ManagementReply,
    ManageModels,
    ObservedPrices,
    UnloadForClient,
)
from server.ipc.pulse import PulseReader


class HeldBytes:
    """The bytes of request bodies and answers that a front holds, at most `limit`.

    Whatever receives or builds a body adds to `size` for as long as it is there.
    """

    def __init__(self, limit: int) -> None:
        self.size = 0
        self._limit = limit

    def __repr__(self) -> str:
        """For example `<HeldBytes 12000 of 1000000>`."""
        return f"<HeldBytes {self.size} of {self._limit}>"

    @property
    def has_room(self) -> bool:
        """Whether more may be held."""
        return self.size <= self._limit

    def check(self) -> None:
        """Raises Refused while there are too many."""
        if not self.has_room:
            raise Refused(Situation.OVERLOADED, "this front holds max_inflight_bytes of requests and answers already")

    @contextlib.contextmanager
    def hold(self, size: int) -> Iterator[None]:
        """Count a body as held in a `with` block. Raises Refused when there is no room for it."""
        self.size += size
        try:
            self.check()
            yield
        finally:
            self.size -= size


class InferencePlane(Protocol):
    """What a dialect has of the data plane: the models that its client may ask, and the bytes that are held.

    `registrations`: what clients have named by TorchServe's and Multi Model Server's management APIs.
    `forecasters`: models that have said of themselves that they forecast, a bounded number of names.
    """

    held: HeldBytes
    background: BackgroundJobs
    finished_jobs: FinishedJobs
    registrations: Registrations
    forecasters: "dict[ModelName, None]"
    token_name: str  #: of the token that the client has shown; empty where it showed none

    @property
    def expected(self) -> int:
        """How many workers the server has, up or not."""

    @property
    def workers(self) -> Mapping[int, PulseReader | None]:
        """The workers that are up, and what is seen of each."""

    async def infer(self, request: InferRequest) -> InferResponse:
        """The model's answer. Raises Refused, and ClientGone when the client is watched and leaves."""

    def select_together(self, models: Sequence[ModelName]) -> list[bool]:
        """Say which of these models can be asked together with others, by `infer_together`."""

    async def infer_together(self, request: TogetherRequest) -> list[TogetherAnswer | Refused | None]:
        """What came of each item of models that were selected; None for one that has to be asked by `infer`.

        Raises Refused for the whole call.
        """

    def permits(self, model: ModelName) -> bool:
        """Whether the client may ask this model."""

    def list_near(self, model: ModelName) -> list[str]:
        """A few names of models that the client may have meant by one that is not there; none where it asks often."""

    async def list_known(self, asked: ListKnownModels, deadline: float) -> list[KnownModel]:
        """The models that the workers know, of those that the client may ask. Raises Refused."""

    async def control(self, asked: LoadForClient | UnloadForClient, deadline: float, *, permitted: bool = False) -> str:
        """Load or unload a model, where the operator allows it or the client is `permitted` to. Raises Refused."""

    async def manage(self, request: ManageModels, deadline: float) -> ManagementReply:
        """The supervisor's answer to who manages models on this listener. Raises Refused."""

    async def record_actuals(self, items: Sequence[ObservedPrices], deadline: float) -> ActualsReply:
        """Record observed prices, all of them or none. Raises Refused."""


class PlaneInFront:
    """What stands in front of a plane and has its own `infer`: all else is the plane's."""

    def __init__(self, plane: InferencePlane) -> None:
        self.held, self.registrations, self.forecasters = plane.held, plane.registrations, plane.forecasters
        self.background, self.finished_jobs, self.token_name = plane.background, plane.finished_jobs, plane.token_name
        self._plane = plane

    @property
    def expected(self) -> int:
        """How many workers the server has, up or not."""
        return self._plane.expected

    @property
    def workers(self) -> Mapping[int, PulseReader | None]:
        """The workers that are up, and what is seen of each."""
        return self._plane.workers

    def select_together(self, models: Sequence[ModelName]) -> list[bool]:
        """Say which of these models can be asked together with others."""
        return self._plane.select_together(models)

    async def infer_together(self, request: TogetherRequest) -> list[TogetherAnswer | Refused | None]:
        """What came of each item. Raises what the plane raises."""
        return await self._plane.infer_together(request)

    def permits(self, model: ModelName) -> bool:
        """Whether the client may ask this model."""
        return self._plane.permits(model)

    def list_near(self, model: ModelName) -> list[str]:
        """A few names of models that the client may have meant."""
        return self._plane.list_near(model)

    async def list_known(self, asked: ListKnownModels, deadline: float) -> list[KnownModel]:
        """The models that the workers know. Raises Refused."""
        return await self._plane.list_known(asked, deadline)

    async def control(self, asked: LoadForClient | UnloadForClient, deadline: float, *, permitted: bool = False) -> str:
        """Load or unload a model. Raises Refused."""
        return await self._plane.control(asked, deadline, permitted=permitted)

    async def manage(self, request: ManageModels, deadline: float) -> ManagementReply:
        """The supervisor's answer. Raises Refused."""
        return await self._plane.manage(request, deadline)

    async def record_actuals(self, items: Sequence[ObservedPrices], deadline: float) -> ActualsReply:
        """Record observed prices. Raises Refused."""
        return await self._plane.record_actuals(items, deadline)


def add_near_names(refused: Refused, model: ModelName, plane: InferencePlane) -> None:
    """Where there is no such model, say the names of some that the client may have meant."""
    if refused.situation is Situation.NOT_FOUND and (near := plane.list_near(model)):
        message = f"{refused.detail.message}; names that are like it: {', '.join(near)}"
        refused.detail = msgspec.structs.replace(refused.detail, message=message)

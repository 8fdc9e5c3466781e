"""What the supervisor may ask of a worker. Runs on the worker's event loop."""

from typing import assert_never

import msgspec

from model_store.errors import LoadError
from model_store.names import ModelName, parse_model_name, parse_versioned_name
from server.access_log import ArrivalBuffer
from server.contract import JSON
from server.errors import Refused, Situation, situation_of
from server.ipc.control import ControlError
from server.ipc.handler_calls import CallTooLong, Pairs
from server.ipc.operations import (
    AskedOfWorker,
    AwaitReplicas,
    DescribeByCode,
    KeptLevels,
    ListModels,
    ListVersions,
    LoadModel,
    ModelState,
    Ping,
    PinModel,
    ReadArchive,
    ReadSample,
    ReloadModel,
    ScrapeMetrics,
    SetBands,
    SetBatching,
    SetQuarantine,
    SetReplicas,
    TakeAccessLog,
    TakeForecasts,
    TryModel,
    UnloadModel,
    UnpinModel,
)
from server.worker.adaptive_bands import AdaptiveBands
from server.worker.archive_facts import ArchiveReader
from server.worker.code_descriptions import CodeDescriptions
from server.worker.inner_requests import InnerRequests
from server.worker.sandbox.code_host import CodeHost
from server.worker.step_loop import StepLoop


class Management:
    """Answers operations from the step loop and the rows for the access log, which is None where none is kept.

    `code` is None where no code may run; it is waited for `patience_s` seconds. `bands` is None where no bands adapt.
    """

    def __init__(
        self,
        steps: StepLoop,
        arrivals: ArrivalBuffer | None,
        archives: ArchiveReader,
        code: CodeHost | None,
        patience_s: float,
        bands: AdaptiveBands | None = None,
    ) -> None:
        self._steps, self._arrivals, self._archives, self._code = steps, arrivals, archives, code
        self._requests, self._bands = InnerRequests(steps, patience_s), bands
        self._descriptions = CodeDescriptions(self._requests)

    def __repr__(self) -> str:
        """For example `<Management of <StepLoop <Cache ...>, <Scheduler ...>>>`."""
        return f"<Management of {self._steps!r}>"

    async def handle(self, operation: AskedOfWorker) -> object:
        """The operation's reply. Raises ControlError with the load's situation for a model that cannot be loaded."""
        try:
            return await self._perform(operation)
        except LoadError as error:
            raise ControlError(error.public, situation_of(error)) from error

    async def _perform(self, operation: AskedOfWorker) -> object:  # noqa: C901, PLR0912 -- one case an operation
        match operation:
            case LoadModel(model):
                return await self._steps.load(parse_versioned_name(model))
            case ReadArchive(model):
                return await self._archives.read(parse_model_name(model))
            case ReloadModel(model):
                return await self._steps.load(parse_versioned_name(model), revalidate=True)
            case PinModel(model):
                return await self._pin(model)
            case UnpinModel(model):
                self._steps.unpin(parse_versioned_name(model))
                return None
            case UnloadModel(model):
                return await self._steps.unload(parse_versioned_name(model))
            case ListModels(prefix, after, limit, whole):
                await self._steps.lent.gather_reports()
                return msgspec.convert(self._steps.describe(prefix, after, limit, whole=whole), list[ModelState])
            case ListVersions(after, limit):
                return self._steps.list_versions(after, limit)
            case SetQuarantine(reasons):
                self._steps.quarantine.replace(reasons)
                return None
            case DescribeByCode(model, headers):
                return await self._describe(parse_model_name(model), headers)
            case ReadSample(model):
                return await self._archives.read_sample(parse_model_name(model))
            case TryModel(model, body):
                return await self._try(parse_model_name(model), body)
            case SetBatching(models, whole):
                if self._code is not None:
                    self._code.follow_batching(models, whole=whole)
                return None
            case SetReplicas(models, whole):
                self._steps.replicas.follow_counts(models, whole=whole)
                return None
            case AwaitReplicas(model):
                return await self._steps.replicas.wait_settled(parse_model_name(model))
            case ScrapeMetrics():
                await self._steps.lent.gather_reports()
                return self._steps.render_metrics()
            case TakeAccessLog(receipts):
                await self._steps.lent.gather_reports()
                return None if self._arrivals is None else self._arrivals.hand_over(receipts)
            case SetBands(models, whole):
                if self._bands is not None:
                    self._bands.follow(models, whole=whole)
                return None
            case TakeForecasts(receipts):
                return KeptLevels([], 0) if self._bands is None else self._bands.take(receipts)
            case Ping():
                return repr(self._steps)
            case _:
                assert_never(operation)

    async def _describe(self, model: ModelName, headers: Pairs) -> bytes:
        """Only code that may run is asked: other archives would take the question for a request."""
        if self._code is None or not self._code.policy.allows(model):
            raise ControlError(f"{model} runs no code here (allow_code)", Situation.BAD_REQUEST)
        try:
            return await self._descriptions.ask(model, headers)
        except CallTooLong as error:
            raise ControlError(str(error), Situation.BAD_REQUEST) from error
        except Refused as refused:
            raise ControlError(str(refused), refused.situation) from refused

    async def _try(self, model: ModelName, body: bytes) -> bytes:
        """Answer a request of an operator as one of a client. A refusal says its place in the message."""
        try:
            return await self._requests.ask(model, body, JSON)
        except Refused as refused:
            instance, field = refused.detail.instance, refused.detail.field
            place = [*([] if instance is None else [f"instances[{instance}]"]), *([field] if field else [])]
            where = f"{'.'.join(place)}: " if place else ""
            raise ControlError(f"{where}{refused}", refused.situation) from refused

    async def _pin(self, model: str) -> str:
        """Load first: a name that cannot be loaded pins nothing."""
        name = parse_versioned_name(model)
        version = await self._steps.load(name)
        self._steps.pin(name)
        return version

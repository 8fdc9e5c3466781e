"""What our processes ask each other over the control channel: one record an operation, with the type of its reply.

`Operation[str]` is answered with a `str`; `Operation[None]` has no answer but that it is done.
"""

from typing import Any, Generic, TypeAlias, TypeVar

from msgspec import UNSET, Struct, UnsetType

from server.access_log import Arrivals, Receipt
from server.bands.adaptive_offsets import BandShape
from server.bands.book import Price
from server.bands.market import AnsweredForecast
from server.host import WorkerPlan
from server.settings import Settings

Reply = TypeVar("Reply")


class Operation(Struct, Generic[Reply], tag=True, tag_field="operation", forbid_unknown_fields=True):
    """Base of all operations. The class's name is what travels."""


# --- a child asks the supervisor ------------------------------------------------------------------------------------


class FrontAssignment(Struct, frozen=True):
    """What a front needs to know: it has the access keys, since it verifies signatures."""

    settings: Settings
    index: int
    cores: tuple[int, ...]
    workers: int  #: how many the server has, up or not
    folder: str = ""  #: private to this server, and gone when it is
    grpc: dict[str, str] = {}  #: where a gRPC front listens for which services; others are given a socket
    journal: str = ""  #: the folder of accepted asynchronous invocations; empty where none are accepted


class WorkerAssignment(Struct, frozen=True):
    """What a worker needs to know. INVARIANT: the settings have no access keys."""

    settings: Settings
    plan: WorkerPlan
    torch_device: str
    socket: str  #: path where the worker listens for the fronts
    pulse: str  #: path of the link to its `server.ipc.pulse`
    rows: int = -1  #: descriptor of its `server.ipc.row_memory`, which it has inherited; -1: its rows end with it
    distrusted: list[str] = []  #: models of an earlier worker that it may have died of
    trusts_rows: bool = True  #: whether rows of an earlier worker may be taken back


class JoinAsFront(Operation[FrontAssignment]):
    """A front has started."""


class JoinAsWorker(Operation[WorkerAssignment]):
    """A worker has started."""


class Ready(Operation[None]):
    """The child serves from now on."""


class Fatal(Operation[None]):
    """A worker cannot be ready with these settings on this host as it is now, and why."""

    error: str


class ReportOverrun(Operation[None]):
    """A run of the model was a danger to others: it goes into quarantine for this reason."""

    model: str
    reason: str


class TrySuspect(Operation[str]):
    """Run a model alone that ran when a worker died. Answered when it may, with nothing, or with why it may not."""

    model: str
    for_s: float  #: how long the request can wait and run
    lost: int = -1  #: the worker that was lost with the request; -1: none


class EndTrial(Operation[None]):
    """The run that `TrySuspect` permitted has ended."""

    model: str
    lost: int  #: the worker that died of it, or fell silent; -1: none


class ManagementAnswer(Struct, frozen=True):
    """The HTTP status and body of a call of the management API."""

    status: int
    body: str


class CallManagement(Operation[ManagementAnswer]):
    """A call of the management API that has come by gRPC, with what its client shows of itself."""

    method: str
    path: str
    query: dict[str, str]
    authorization: str
    peer: str
    certificate: str


class ModelUsage(Struct, frozen=True):
    """What workers counted of a model's requests since it was loaded. Times: sums in microseconds, over the answers."""

    answers: int = 0
    failures: int = 0
    batches: int = 0
    answered_us: int = 0  #: from arrival to answer
    failed_us: int = 0
    queued_us: int = 0
    ran_us: int = 0
    last_ms: int = 0  #: when the last answer's batch began, since 1970; 0: there is none


class KnownModel(Struct, frozen=True):
    """A model that the workers know, as clients see it. `reason`: why it is not ready."""

    model: str
    state: str  #: ready, loading, unloading or unavailable
    reason: str = ""
    usage: ModelUsage = ModelUsage()


class ListKnownModels(Operation[list[KnownModel]]):
    """The first `limit` models, by name, that the workers know, with this prefix and after a name."""

    prefix: str
    after: str
    limit: int


class LoadForClient(Operation[str]):
    """A client's wish, which the operator has allowed. Answered with the version that serves."""

    model: str


class UnloadForClient(Operation[str]):
    """As LoadForClient. Answered with nothing, when the model's memory is free everywhere."""

    model: str


class ManagementReply(Struct, frozen=True):
    """What the supervisor answers a client of an archived server's management API: JSON."""

    status: int
    body: bytes


class ManageModels(Operation[ManagementReply]):
    """A request of Multi Model Server's management API, which a front has got where it is a container's one port."""

    method: str
    path: str
    query: str
    body: bytes


class ObservedPrices(Struct, frozen=True):
    """Prices of one model, under the name by which clients ask it; `product`: which, where it has several.

    `strict`: refuse the call where the model has no such product; else the prices are unmatched.
    """

    model: str
    prices: list[Price]
    product: str = ""
    strict: bool = True


class PairedCounts(Struct, frozen=True):
    """How many prices of one model were paired with a forecast, had been before, and were not forecast."""

    paired: int
    repeated: int
    unmatched: int


class ActualsReply(Struct, frozen=True):
    """Counts by item. `unheard`: workers that have not said that they follow; they have 0 requests or end."""

    counts: list[PairedCounts]
    adapted: bool
    unheard: list[int]


class RecordActuals(Operation[ActualsReply]):
    """Observed prices. Answered when they are on the disk, and all workers follow what they change."""

    items: list[ObservedPrices]


class DescribeNode(Operation[bytes]):
    """What this server does, for another node's viewers: a part of `GET /fleet/overview`, as JSON."""


AskedByFront: TypeAlias = (
    JoinAsFront
    | Ready
    | TrySuspect
    | EndTrial
    | CallManagement
    | ManageModels
    | ListKnownModels
    | LoadForClient
    | UnloadForClient
    | RecordActuals
    | DescribeNode
)
AskedByWorker: TypeAlias = JoinAsWorker | Ready | Fatal | ReportOverrun

# --- the supervisor asks any child ----------------------------------------------------------------------------------


class Ping(Operation[str]):
    """Answered by an event loop that turns, with the process's state in words."""


class ScrapeMetrics(Operation[str]):
    """The process's metrics in Prometheus's text format."""


# --- the supervisor asks a front ------------------------------------------------------------------------------------


class Exemplar(Struct, frozen=True):
    """One request of a histogram's bucket: the bucket's labels, the request's id and seconds, when it was counted.

    `trace_id`: of its trace, where it was sampled.
    """

    labels: dict[str, str]
    request_id: str
    seconds: float
    at: float
    trace_id: str = ""


class ListExemplars(Operation[list[Exemplar]]):
    """Examples of the requests in the buckets of `inference_request_seconds`."""


class ConnectWorkers(Operation[None]):
    """Be connected to these workers and to no others: socket path by worker index. Answered at once."""

    sockets: dict[int, str]


class Drain(Operation[None]):
    """Finish the requests under way, take no new ones, and end."""


class ReleaseArm(Struct, frozen=True):
    """What a name stands for, in a share of its requests. `model` may name a version, as `at_version` makes it.

    `version`: the one it is held at; empty where it follows the store.
    """

    model: str
    version: str
    share: float


class SetReleases(Operation[None]):
    """What names stand for that are not simply their archives, in place of those told before."""

    routes: dict[str, list[ReleaseArm]]


class ServedVersion(Struct, frozen=True):
    """One version of a registered model: the archive's name, whether it has workers, and how long it may take."""

    key: str
    workers: int
    timeout_s: float


class RegisteredModel(Struct, frozen=True):
    """What clients of TorchServe's and Multi Model Server's protocols have registered under a name."""

    default: str
    versions: dict[str, ServedVersion]


class SetRegistrations(Operation[None]):
    """What is registered under these names from now on; None: nothing any more. `whole`: and under no others."""

    models: dict[str, RegisteredModel | None]
    whole: bool


class AwaitConnections(Operation[None]):
    """Answered when the front is connected to all workers that `ConnectWorkers` named last."""


class NodeView(Struct, frozen=True):
    """A node of the table as this front sees it. `state`: here, linked, silent or lost; the addresses as announced.

    `summary`: what it said to `DescribeNode`; empty where it was not asked or did not answer, and `why` not.
    """

    name: str
    state: str
    inference: str = ""
    management: str = ""
    metrics: str = ""
    summary: bytes = b""
    why: str = ""


class DescribeNodes(Operation[list[NodeView]]):
    """The nodes of the table by name; those that answer within `within_s` (0: none is asked) say what they do."""

    within_s: float


AskedOfFront: TypeAlias = (
    Ping
    | Drain
    | ScrapeMetrics
    | ListExemplars
    | ConnectWorkers
    | AwaitConnections
    | SetReleases
    | SetRegistrations
    | DescribeNodes
)

# --- the supervisor asks a worker -----------------------------------------------------------------------------------


class LoadModel(Operation[str]):
    """Answered with the version that serves."""

    model: str


class ReloadModel(Operation[str]):
    """As `LoadModel`, and the store is asked even if the model is here."""

    model: str


class ArchiveFacts(Struct, frozen=True):
    """What an archive says of itself; empty where it says nothing. `kind`: see `model_store.archives.manifest.Kind`."""

    name: str = ""
    version: str = ""
    handler: str = ""
    runtime: str = ""
    created_on: str = ""
    kind: str = ""


class ReadArchive(Operation[ArchiveFacts]):
    """What the archive says of itself. It is fetched for that where the host does not have it, but not loaded."""

    model: str


class ReadSample(Operation[bytes]):
    """The request of the archive's golden sample as JSON, empty without one. It is fetched for that, but not loaded."""

    model: str


class TryModel(Operation[bytes]):
    """The model's answer to this JSON body, as a client would get it."""

    model: str
    body: bytes


class DescribeByCode(Operation[bytes]):
    """What the code of an archive says of itself, asked with these headers."""

    model: str
    headers: list[tuple[str, str]]


class Batching(Struct, frozen=True):
    """How the requests of a code archive are batched, instead of as the archive says."""

    size: int
    delay_s: float


class SetBatching(Operation[None]):
    """How these are batched from their next load on; None: as they say themselves. `whole`: and all others too."""

    models: dict[str, Batching | None]
    whole: bool


class SetReplicas(Operation[None]):
    """How many processes each of these code archives has from now on. `whole`: and all others have one."""

    models: dict[str, int]
    whole: bool


class AwaitReplicas(Operation[int]):
    """Answered when no process of the archive is being started any more: how many there are; 0: it runs no code."""

    model: str


class UnloadModel(Operation[bool]):
    """Answered when the model's memory is free: whether the model was here."""

    model: str


class PinModel(Operation[str]):
    """Load the model and never evict it. Answered with the version that serves; what cannot be loaded is not pinned."""

    model: str


class UnpinModel(Operation[None]):
    """The model may be evicted again."""

    model: str


class SetQuarantine(Operation[None]):
    """The models that no worker runs, with the reasons, in place of those named before."""

    reasons: dict[str, str]


class ModelProcess(Struct, frozen=True):
    """One process of a code archive."""

    pid: int
    bytes: int


class ModelState(Struct, frozen=True):
    """One version of a model at a worker: what it is, or that it is loading, or why it failed. As operators see it."""

    model: str
    version: str | UnsetType = UNSET
    state: str | UnsetType = UNSET
    family: str | UnsetType | None = UNSET
    bytes: int | UnsetType = UNSET
    one_by_one: str | UnsetType = UNSET
    forecast: dict[str, Any] | UnsetType = UNSET  # what a forecast request must know
    pid: int | UnsetType = UNSET
    processes: list[ModelProcess] | UnsetType = UNSET  # of a code archive with several
    leases: int | UnsetType = UNSET
    pinned: bool | UnsetType = UNSET
    tier: str | UnsetType = UNSET  # that it was loaded from
    load_ms: float | UnsetType = UNSET
    loaded_s_ago: float | UnsetType = UNSET
    used_s_ago: float | UnsetType = UNSET
    usage: ModelUsage | UnsetType = UNSET
    error: str | UnsetType = UNSET
    reason: str | UnsetType = UNSET


class ListModels(Operation[list[ModelState]]):
    """The first `limit` models, by name, that have this prefix and come after a name: resident, loading or failed."""

    prefix: str
    after: str
    limit: int
    whole: bool = False  #: with all that a request must know


class ListVersions(Operation[dict[str, str]]):
    """The versions that serve, by model: of the first `limit` resident models, by name, that come after a name."""

    after: str
    limit: int


class TakeAccessLog(Operation[Arrivals | None]):
    """The rows for the access log that have not arrived; None where none are kept.

    `receipts`: of what has arrived last from each worker. Only then are rows the supervisor's.
    """

    receipts: list[Receipt]


class BandOffsets(Struct, frozen=True):
    """Offsets float32 [rows, levels] of a market whose archive, of this name, has this shape."""

    archive: str
    shape: BandShape
    offsets: bytes


class SetBands(Operation[None]):
    """How the bands of these markets (`server.bands.book`) are shifted from now on; an empty list: not.

    `whole`: and no others are.
    """

    models: dict[str, list[BandOffsets]]
    whole: bool


class KeptLevels(Struct, frozen=True):
    """Forecasts that were answered, and how many more had no room. `receipt`: says that this has arrived."""

    forecasts: list[AnsweredForecast]
    dropped: int
    receipt: str = ""


class TakeForecasts(Operation[KeptLevels]):
    """The forecasts that were answered since the last time. They are the supervisor's once it has sent their receipt.

    `receipts`: of what has arrived last from each worker.
    """

    receipts: list[str]


AskedOfWorker: TypeAlias = (
    Ping
    | ScrapeMetrics
    | LoadModel
    | ReadArchive
    | ReloadModel
    | UnloadModel
    | PinModel
    | UnpinModel
    | ListModels
    | ListVersions
    | TakeAccessLog
    | SetQuarantine
    | SetBatching
    | SetReplicas
    | AwaitReplicas
    | DescribeByCode
    | SetBands
    | TakeForecasts
    | ReadSample
    | TryModel
)


def reply_type(operation: type[Operation[Any]]) -> Any:
    """The type of an operation's reply, for example `str` of `Operation[str]`."""
    (base,) = operation.__orig_bases__  # type: ignore[attr-defined]
    (reply,) = base.__args__
    return reply

"""From a model name to something that can run: fetch, verify, build. Runs on a worker's loader threads.

Nothing here touches the cache, the pool or a queue: the result goes back to the step thread, which finds it a place.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import orjson
import structlog

from handlers.base import Family, Float32, Single
from handlers.codecs.codec import FamilyCodec, SingleCodec
from handlers.codecs.joint import JointCodec, JointModel
from handlers.codecs.scenarios import load_correlation
from handlers.errors import RequestError, RunFailed
from handlers.forecasters import check_forecast, family
from handlers.golden import mismatch
from handlers.kinds.graph import GraphFamily, graph_family
from handlers.kinds.onnx import OnnxModel, Provider
from model_store.archives.archive import Archive, Limits, check_tensors, read_tensors, require_supported
from model_store.archives.manifest import GoldenSample, Kind
from model_store.errors import GoldenMismatch, LoadError
from model_store.names import ModelName
from model_store.stores.model_store import ModelStore
from model_store.stores.object_store import Source, open_source
from server.settings import Settings

JSON = "application/json"

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class RowModel:
    """A model of a family. Its numbers are a row of the pool; here is only how it runs and speaks."""

    family: Family
    codec: FamilyCodec
    one_by_one: str = ""  #: why its rows do not run together with others; empty where they do


@dataclass(frozen=True, slots=True)
class SingleModel:
    """A model that runs alone."""

    single: Single | JointModel
    codec: SingleCodec | JointCodec


@dataclass(frozen=True, slots=True)
class Built:
    """A verified model without a place: `row` for a RowModel. `download_s` in store requests, `tier` disk or store.

    `validated_at`: wall clock, when the store was last asked for this version.
    """

    model: ModelName
    version: str
    tier: str
    download_s: float
    body: RowModel | SingleModel
    row: Float32 | None
    golden: GoldenSample | None
    validated_at: float = 0.0

    @property
    def charge(self) -> int:
        """Bytes it will hold in the cache's budget."""
        if isinstance(self.body, SingleModel):
            return self.body.single.charge_bytes
        assert self.row is not None, "a row model is built with its row"
        return self.row.nbytes

    @property
    def family(self) -> str | None:
        """The key of its family; None for a single."""
        return self.body.family.key if isinstance(self.body, RowModel) else None


class Builder(Protocol):
    """What the step loop wants of a loader."""

    def build(self, model: ModelName, *, revalidate: bool = False) -> Built:
        """A verified model. Called on loader threads. Raises LoadError."""

    def forget(self, model: ModelName) -> None:
        """The archive proved bad after all: the next load asks the store again."""


class Loader:
    """Builds models from one store. Thread-safe."""

    def __init__(self, store: ModelStore, device: str, threads: int) -> None:
        self._store = store
        self._provider: Provider = "cpu" if device == "cpu" else "cuda"
        self._threads = threads

    def __repr__(self) -> str:
        """For example `<Loader of ModelStore(...)>`."""
        return f"<Loader of {self._store!r}>"

    def build(self, model: ModelName, *, revalidate: bool = False) -> Built:
        """Fetch and verify; everything but the golden sample of a row, which needs the device. Raises LoadError."""
        found = self._store.fetch(model, revalidate)
        try:
            require_supported(found.archive)
            body, row = self._body(found.archive)
            golden = found.archive.golden()
            if golden is not None and isinstance(body, SingleModel):
                single = body.single
                prove(model, golden, body.codec, lambda call: single.run(call.feeds))
        except LoadError as error:
            self._store.forget(model)
            if str(error).startswith(model):
                raise
            raise type(error)(f"{model}: {error}") from error  # networks and codecs do not know whose they are
        return Built(model, found.version, found.tier, found.store_s, body, row, golden, found.validated_at)

    def forget(self, model: ModelName) -> None:
        """The archive proved bad after all: the next load asks the store again."""
        self._store.forget(model)

    def _body(self, archive: Archive) -> tuple[RowModel | SingleModel, Float32 | None]:
        if archive.kind is Kind.ONNX:
            single = OnnxModel(archive.weights(), threads=self._threads, provider=self._provider)
            return SingleModel(single, SingleCodec(single.inputs, single.outputs)), None
        if archive.spec is not None and archive.spec.correlation:
            correlation = load_correlation(archive.spec.correlation, read_tensors(archive))
            return SingleModel(JointModel(correlation), JointCodec(correlation)), None
        assert archive.spec is not None, "forecasters and graphs are known by their fleetcast.json"
        graph = graph_family(archive.graph()) if archive.kind is Kind.GRAPH else None
        network = graph or family(archive.spec)
        if graph is not None and archive.spec.forecast is not None:
            check_forecast(graph, archive.spec.forecast)
        tensors = read_tensors(archive)
        check_tensors(tensors, network.parameters, archive.name)
        row = network.row(tensors)
        one_by_one = _one_by_one(graph, row) if graph is not None else ""
        return RowModel(network, FamilyCodec(network, archive.spec.forecast), one_by_one), row


def _one_by_one(graph: GraphFamily, row: Float32) -> str:
    """Why the graph's rows do not run together; tried and logged with its first archive. Raises ArchiveInvalid."""
    if graph.one_by_one is None:
        graph.decide(row)
        log.info("graph_family", family=graph.key, runs=graph.runs)
    return graph.one_by_one or ""


def open_store(settings: Settings) -> tuple[Source, Limits]:
    """The settings' store and the limits of what it may give. Raises InvalidStoreUrl, StoreDenied."""
    limits = Limits(
        max_archive_bytes=int(settings.max_archive_bytes), max_unpacked_bytes=int(settings.max_unpacked_bytes)
    )
    source = open_source(
        settings.store,
        timeout_s=settings.store_timeout_s,
        retries=settings.store_retries,
        profile=settings.s3_profile,
        endpoint_url=settings.s3_endpoint_url,
        region=settings.s3_region,
        max_archive_bytes=limits.max_archive_bytes,
    )
    return source, limits


def prove(
    name: str, golden: GoldenSample, codec: FamilyCodec | SingleCodec | JointCodec, run: Callable[[Any], Any]
) -> None:
    """Raises GoldenMismatch, naming the first number that is off, unless `run` answers the sample as the archive says.

    `run` takes the decoded call and gives what its `encode` takes.
    """
    try:
        call = codec.decode(orjson.dumps(golden.request), JSON, JSON)
        answer, _ = call.encode(run(call))
    except (RequestError, RunFailed) as error:
        raise GoldenMismatch(f"{name}: the golden sample cannot be run: {error}") from error
    difference = mismatch(golden.response, orjson.loads(answer), golden.abs_tolerance, golden.rel_tolerance)
    if difference:
        raise GoldenMismatch(f"{name}: the golden sample is not reproduced: {difference}")


def timed_build(loader: Builder, model: ModelName, *, revalidate: bool) -> tuple[Built | LoadError, float]:
    """The built model, or why not, and the seconds it took. Whatever else goes wrong becomes a LoadError too."""
    started = time.perf_counter()
    try:
        return loader.build(model, revalidate=revalidate), time.perf_counter() - started
    except LoadError as error:
        return error, time.perf_counter() - started
    except Exception as error:  # a bug of ours must cost one model, not the worker
        return LoadError(f"{model}: loading failed unexpectedly: {error!r}"), time.perf_counter() - started

"""From a model name to something that can run: fetch, verify, build. Runs on a worker's loader threads.

Nothing here touches the cache, the pool or a queue: the result goes back to the step thread, which finds it a place. A
load is a generator: between two of its steps it changes the lane, see `server.worker.load_lanes`.
"""

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch

from handlers import kinds
from handlers.base import Family, Float32
from handlers.kinds import BuiltModel, RowModel, RunRow, SingleModel, Target
from handlers.kinds.kept_rows import makes_rows
from handlers.work import SessionLimits, WorkLimits
from model_store.archives.archive import Archive
from model_store.archives.manifest import GoldenSample
from model_store.errors import ArchiveInvalid, LoadError, NoRoom
from model_store.names import ModelName, split_version
from model_store.stores.load_parts import timing_part
from model_store.stores.model_store import REPAIRS, FetchedArchive, ModelStore
from server.settings import Settings
from server.worker.sandbox.child_process import ChildProcess
from server.worker.sandbox.code_host import CodeHost, PreparedCode
from server.worker.survivors.surviving_rows import DescribeRow, RowRecord, describe_no_row
from server.worker.thread_priority import keep_ordinary_threads

Body: TypeAlias = RowModel | SingleModel | ChildProcess  #: how a loaded model runs


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A verified model without a place: `row` for a RowModel. `download_s` in store requests, `tier` disk or store.

    `validated_at`: wall clock, when the store was last asked for this version. `stale`: it is due, and the store has
    not been heard on it.
    """

    model: ModelName
    version: str
    tier: str
    download_s: float
    body: Body
    row: Float32 | None
    golden: GoldenSample | None
    validated_at: float = 0.0
    stale: bool = False
    record: RowRecord | None = None  #: of a row: what is kept of it should this worker die

    def prove(self, run_row: RunRow) -> None:
        """Run the golden sample of a row, if there is one: the loader has run that of a model without a row.

        Raises GoldenMismatch.
        """
        if self.golden is not None and self.row is not None and not isinstance(self.body, ChildProcess):
            self.body.prove(self.model, self.golden, self.row, run_row)

    @property
    def charge(self) -> int:
        """Bytes it will hold in the cache's budget."""
        return self.body.charge_bytes(self.row)

    @property
    def runs_code(self) -> bool:
        """Whether it is a code archive, which runs in a process of its own."""
        return isinstance(self.body, ChildProcess)

    @property
    def family(self) -> str | None:
        """The key of its family; None for a model that runs alone."""
        return self.body.family_key


@dataclass(frozen=True, slots=True)
class AskStore:
    """The load's next step asks the store. `has_copy`: there is a copy on disk that could be served meanwhile."""

    has_copy: bool


@dataclass(frozen=True, slots=True)
class BuildFetched:
    """The load's next step builds what the store gave. `stale`: the store did not answer, so it is the copy on disk.

    `size`: bytes of the archive, which is in memory until it is built.
    """

    stale: bool
    size: int = 0


@dataclass(frozen=True, slots=True)
class UnpackedCode:
    """A code archive's files in a folder, and what `LoadedModel` says of them. The archive's bytes are not held."""

    code: PreparedCode
    version: str
    tier: str
    download_s: float
    validated_at: float
    stale: bool


@dataclass(frozen=True, slots=True)
class StartCode:
    """The load's next step starts the code of an archive, and waits for it: its time is not ours."""


#: A load. Each step runs on a thread of the lane that the step before it named; the first one's is the disk lane.
LoadSteps = Generator[AskStore | BuildFetched | StartCode, None, LoadedModel]


class ModelBuilder(Protocol):
    """What the step loop wants of a loader."""

    def load(self, model: ModelName, *, revalidate: bool = False, stale: bool = False) -> LoadSteps:
        """The steps to a verified model; each may raise LoadError. `stale`: take a copy on disk also if it is due."""

    def forget(self, model: ModelName) -> None:
        """The archive proved bad after all: the next load asks the store again."""


class ModelLoader:
    """Builds models from one store. Thread-safe, and so is `measure`, which is told of each row's family.

    `code` runs code archives; None: none is run. `describe_row` makes the record of a row, see `LoadedModel`. It
    builds up to `threads` models at a time.
    """

    def __init__(
        self,
        store: ModelStore,
        target: Target,
        measure: Callable[[Family], object] = lambda _: None,
        *,
        code: CodeHost | None = None,
        describe_row: DescribeRow = describe_no_row,
        threads: int = 1,
    ) -> None:
        self._store, self._target, self._measure, self._code = store, target, measure, code
        self._ordinary = keep_ordinary_threads("session", threads)
        self._describe_row = describe_row

    def __repr__(self) -> str:
        """For example `<ModelLoader of ModelStore(...)>`."""
        return f"<ModelLoader of {self._store!r}>"

    def load(self, model: ModelName, *, revalidate: bool = False, stale: bool = False) -> LoadSteps:
        """Find and verify; everything but the golden sample of a row, which needs the device. Raises LoadError.

        An archive that is invalid because it was damaged on its way is fetched again, at most REPAIRS times.
        INVARIANT: no variable here keeps an error. Its traceback holds this frame, and so the archive's bytes, which
        would then stay until the garbage collector comes.
        """
        name, version = split_version(model)
        if version:
            return (yield from self._load_version(model, name, version))
        with timing_part("disk"):
            found, has_copy = (None, False) if revalidate else self._store.at_hand(model, stale=stale)
        if found is None:
            yield AskStore(has_copy)
            with timing_part("store"):
                found = self._store.fetch(model, revalidate)
            yield BuildFetched(found.stale, found.size)
        for repairs_left in reversed(range(REPAIRS + 1)):
            try:
                with timing_part("build"):
                    built = self._build_fetched(model, found)
            except LoadError as error:
                fresh = None
                if repairs_left and isinstance(error, ArchiveInvalid) and self._store.may_be_damaged(found):
                    yield AskStore(has_copy=False)
                    with timing_part("store"):
                        fresh = self._store.repair(model, found)
                if fresh is None:
                    self._store.forget(model)
                    raise
                found = fresh
                yield BuildFetched(found.stale, found.size)
            else:
                del found  # a process may take long to start, and its archive's bytes are not needed for that
                return built if isinstance(built, LoadedModel) else (yield from self._start_code(model, built))
        raise AssertionError("the last time is without repair: it returns or raises")

    def _load_version(self, model: ModelName, name: ModelName, version: str) -> LoadSteps:
        """The same for `model`, which is a version of the archive `name`."""
        with timing_part("disk"):
            found = self._store.version_at_hand(name, version)
        if found is None:
            yield AskStore(has_copy=False)
            with timing_part("store"):
                found = self._store.fetch_version(name, version)
            yield BuildFetched(found.stale, found.size)
        with timing_part("build"):
            built = self._build_fetched(model, found)
        del found
        return built if isinstance(built, LoadedModel) else (yield from self._start_code(model, built))

    def _start_code(self, model: ModelName, unpacked: UnpackedCode) -> LoadSteps:
        """Start the archive's child, in the code lane. Raises LoadError."""
        yield StartCode()
        try:
            with timing_part("start_code"):
                child = unpacked.code.start()
        except LoadError:
            self._store.forget(model)
            raise
        return LoadedModel(
            model,
            unpacked.version,
            unpacked.tier,
            unpacked.download_s,
            child,
            None,
            None,
            unpacked.validated_at,
            unpacked.stale,
        )

    def _build_fetched(self, model: ModelName, found: FetchedArchive) -> LoadedModel | UnpackedCode:
        if self._code is not None and self._code.runs(model, found.archive):
            code = self._code.prepare(model, found.archive)
            return UnpackedCode(code, found.version, found.tier, found.store_s, found.validated_at, found.stale)
        is_row = makes_rows(kinds.find_kind(found.archive))
        built, golden = (
            self._build_proven(model, found.archive)
            if is_row
            else self._ordinary.submit(self._build_proven, model, found.archive).result()
        )
        record = None
        if isinstance(built.body, RowModel):
            self._measure(built.body.family)
            assert built.row is not None, "a row model is built with its row"
            record = self._describe_row(found.archive, built.body, built.row)
        return LoadedModel(
            model,
            found.version,
            found.tier,
            found.store_s,
            built.body,
            built.row,
            golden,
            found.validated_at,
            found.stale,
            record,
        )

    def _build_proven(self, model: ModelName, archive: Archive) -> tuple[BuiltModel, GoldenSample | None]:
        """The model and its golden sample, which is run here unless it is a row's.

        One that is no row makes threads that its requests run on: they inherit the priority of the thread of this call.
        """
        built, golden = kinds.build_model(archive, self._target), archive.golden()
        if golden is not None and built.row is None:
            built.body.prove(model, golden, None)
        return built, golden

    def forget(self, model: ModelName) -> None:
        """The archive proved bad after all: the next load asks the store again."""
        self._store.forget(model)


def target_of(settings: Settings, device: str, threads: int) -> Target:
    """Where models run and what their requests may cost, as the settings say; `device` as torch calls its type."""
    return Target(
        "cpu" if device == "cpu" else "cuda",
        threads,
        WorkLimits(settings.max_request_gflop, settings.max_request_numbers),
        SessionLimits(
            int(settings.max_session_bytes), settings.max_forward_s, loops=settings.onnx_control_flow == "allow"
        ),
        settings.onnx_device,
        tf32=settings.precision == "tf32",
    )


def unexpected(model: ModelName, error: Exception) -> LoadError:
    """What is no LoadError as one: clients are not shown what it says, which may be a path of this host.

    Of a device that is out of memory, which the error's cause says, it is no secret.
    """
    if isinstance(error, torch.OutOfMemoryError):
        found = NoRoom(f"{model}: the device is out of memory: {error}")
        found.__cause__ = error
        return found
    what = f"{model}: loading failed unexpectedly"
    return LoadError(f"{what}: {error!r}", f"{what}; the server's log says why")

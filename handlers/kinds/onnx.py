"""Archives of kind onnx: one ONNX Runtime session a model, float32 in and out, and no file is read but its bytes."""

import math
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import Any, Literal

import numpy as np
import torch

from handlers.base import Float32, Shape
from handlers.codecs.codec import SingleCodec
from handlers.errors import Overran, RunFailed
from handlers.kinds import onnx_cuda
from handlers.kinds.models import BuiltModel, SingleModel, Target
from handlers.kinds.onnx_scan import check_model
from handlers.kinds.packing import ArchiveParts
from handlers.work import SessionLimits
from model_store.archives.archive import Archive
from model_store.archives.manifest import Kind, Spec, Weights
from model_store.errors import ArchiveInvalid, UnsupportedKind

Provider = Literal["cpu", "cuda"]
ONNX_SUFFIX = ".onnx"
ONNX_FILE = f"model{ONNX_SUFFIX}"
LIMITS = SessionLimits()
PAGE = os.sysconf("SC_PAGE_SIZE")

SESSION_BYTES = 320 * 1024
BYTES_PER_MODEL_BYTE = 1.25
MEASURED_BYTES = 8 * 2**20  #: growth of the process below this says nothing of a session
QUICK_S = 2e-3  #: a model whose row the CPU answers sooner gains nothing on a GPU: see DECISIONS
PROBE_S = 1.0  #: most that the run of a load takes, which measures and has libraries make what they need
WATCH_S = 0.02  #: how late a run that takes too long may be ended
MOST_TOGETHER = 32 * 2**20  #: bytes of inputs in one run
ATOL, RTOL = 1e-5, 1e-4  #: within which answers run together equal those run alone


class OnnxKind:
    """See ArchiveKind."""

    kind = Kind.ONNX

    def recognises(self, archive: Archive) -> bool:
        """By the ONNX file that the MAR manifest names, or `model.onnx`."""
        return find_onnx_file(archive) in archive.container.members

    def build(self, archive: Archive, target: Target) -> BuiltModel:
        """A session where `place_session` says. Raises as `OnnxModel` does."""
        model = place_session(_read_file(archive), target)
        body = SingleModel(model, SingleCodec(model.inputs, model.outputs), unbounded=model.loops)
        return BuiltModel(body, None, "onnx")

    def tensor_inputs(self, archive: Archive) -> Mapping[str, Shape]:
        """The session's inputs. Raises ArchiveInvalid, UnsupportedKind."""
        return OnnxModel(_read_file(archive)).inputs

    def describe(self, archive: Archive) -> dict[str, Any]:
        """Nothing: the model is not opened."""
        del archive
        return {}

    def pack(self, parts: ArchiveParts) -> tuple[Spec, Mapping[str, bytes]]:
        """The `program`, the bytes of an ONNX file."""
        return Spec(kind=self.kind, weights=Weights(file=ONNX_FILE)), {ONNX_FILE: parts.program}


def find_onnx_file(archive: Archive) -> str:
    """The name that the ONNX file of an archive without `fleetcast.json` would have."""
    named = archive.mar.model.serialized_file if archive.mar else ""
    return named if named.endswith(ONNX_SUFFIX) else ONNX_FILE


def _read_file(archive: Archive) -> bytes:
    return bytes(archive.weights() if archive.spec else archive.read(find_onnx_file(archive)))


def place_session(model: bytes, target: Target) -> "OnnxModel":
    """A session on the target's device, or on the CPU where the target says so or the model is quick there.

    Raises as `OnnxModel` does.
    """
    if target.device == "cpu" or target.onnx_device != "device":
        here = OnnxModel(model, threads=target.threads, limits=target.sessions)
        if target.device == "cpu" or target.onnx_device == "cpu" or here.time_row() < QUICK_S:
            return here
        del here  # its memory is free before the other is measured
    return OnnxModel(model, threads=target.threads, provider="cuda", limits=target.sessions, tf32=target.tf32)


class OnnxModel:
    """A loaded session. `run` may be called by one thread at a time.

    The charge is 320 KiB + 1.25 x the model's bytes: private memory grew by 394 KiB a session for 50 sessions of the
    17.5k-parameter dilated CNN (78 KiB of model) and by 1257 KiB at 128 channels (858 KiB), one run done in each, with
    onnxruntime 1.31 on CPU, one thread and no arena. An arena added 147 and 344 KiB and was not faster. A session that
    made the process grow by much more than that (its weights unpacked, or packed anew for products) is charged what was
    measured. On CUDA it is charged what the device's free memory shrank by, one run included, if that is more: the
    provider's handles and workspaces take tens of megabytes, and no rule says how many.

    Intermediate results lie in one arena for all sessions of the process, which has a limit, so neither a model nor
    the numbers of a request can take more. Constants are not folded: 296 bytes made 2 GB that way.
    """

    def __init__(
        self,
        model: bytes,
        *,
        threads: int = 1,
        provider: Provider = "cpu",
        limits: SessionLimits = LIMITS,
        tf32: bool = False,
    ) -> None:
        """Builds the session from the bytes of `model.onnx`.

        Raises:
            ArchiveInvalid: not an ONNX model, external data, a loop where none is allowed, a sparse tensor that is
                too large once it is dense, inputs or outputs that are not float32 tensors with a
                batch axis first (dynamic, or fixed at 1: such a model runs row by row).
            UnsupportedKind: ONNX Runtime or the wanted provider is not installed, or gives a session somewhere else.
            torch.OutOfMemoryError: the device is full.
            DeviceFailed: the device is lost.
        """
        self.loops = check_model(model, loops=limits.loops)  #: so its time does not follow from its input's size
        self._runtime, self._forward_s, self._on_cuda = _import_runtime(provider), limits.forward_s, provider == "cuda"
        _share_arenas(self._runtime, limits.memory_bytes, provider)
        with _measured_growth(provider) as grown:
            self._session: Any = _open_session(self._runtime, model, threads, provider, limits.memory_bytes, tf32=tf32)
            self._describe()
            if provider == "cuda":
                self._run_first()
        usual = SESSION_BYTES + int(BYTES_PER_MODEL_BYTE * len(model))
        noise = 0 if provider == "cuda" else usual + MEASURED_BYTES
        self.charge_bytes = usual if grown[0] < usual + noise else grown[0]

    def _describe(self) -> None:
        taken = {each.name: _check_shape("input", each) for each in self._session.get_inputs()}
        given = {each.name: _check_shape("output", each) for each in self._session.get_outputs()}
        if not taken or not given:
            raise ArchiveInvalid("model.onnx: a model needs at least one input and one output")
        self.inputs: Mapping[str, Shape] = {name: shape[1:] for name, shape in taken.items()}
        self.outputs: Mapping[str, Shape] = {name: shape[1:] for name, shape in given.items()}
        self._row_by_row = any(shape[0] == 1 for shape in taken.values())
        self._apart: bool | None = False if self._row_by_row else None  # whether requests run together stay apart

    def __repr__(self) -> str:
        how = "row by row" if self._row_by_row else "batched"
        where = "CUDA" if self._on_cuda else "the CPU"
        return f"<OnnxModel {dict(self.inputs)} -> {', '.join(self.outputs)}, {how} on {where}>"

    def time_row(self) -> float:
        """Seconds of a row of ones, the best of three runs; infinity where lengths are open, or the run fails."""
        if any(length < 0 for shape in self.inputs.values() for length in shape):
            return math.inf
        best = math.inf
        for _ in range(3):
            started = time.perf_counter()
            try:
                self._run(self._ones(), 1, PROBE_S)
            except RunFailed:
                return math.inf
            best = min(best, time.perf_counter() - started)
        return best

    def _run_first(self) -> None:
        """Run one row, so that what libraries make at a first use is made, and measured, at the load.

        A row of ones may well be one that the model fails for, or be too slow: requests will show it. Raises
        torch.OutOfMemoryError.
        """
        try:
            self._run(self._ones(), 1, PROBE_S)
        except RunFailed:
            pass

    def _ones(self) -> dict[str, Float32]:
        shapes = {name: [1, *(max(1, length) for length in shape)] for name, shape in self.inputs.items()}
        return {name: np.ones(shape, np.float32) for name, shape in shapes.items()}

    def run(self, feeds: Mapping[str, Float32]) -> Mapping[str, Float32]:
        """Arrays [N, *shape] by input name -> arrays [N, ...] by output name.

        Raises RunFailed, Overran; on CUDA torch.OutOfMemoryError and DeviceFailed too.
        """
        rows = len(next(iter(feeds.values())))
        if not self._row_by_row or rows == 1:
            return self._run(feeds, rows)
        answers = [self._run({name: array[i : i + 1] for name, array in feeds.items()}, 1) for i in range(rows)]
        try:
            return {name: np.concatenate([answer[name] for answer in answers]) for name in self.outputs}
        except ValueError as error:
            raise RunFailed(f"the rows' outputs differ in shape: {error}") from error

    def run_all(self, requests: Sequence[Mapping[str, Float32]]) -> list[dict[str, Float32] | RunFailed]:
        """As `run` for each. One run for all where they stack and the graph keeps rows apart, as most do.

        A graph with an open batch axis may still mix rows (a softmax or a mean along the batch), and then one client's
        answer would depend on another's request. So the first requests that differ are run both ways and compared.

        Raises Overran when a run took too long, and DeviceFailed: what is left of the requests is not run.
        """
        size = sum(array.nbytes for feeds in requests for array in feeds.values())
        if self._apart is False or len(requests) == 1 or size > MOST_TOGETHER or not _can_stack(requests):
            return [self._attempt(feeds) for feeds in requests]
        together = self._stacked(requests)
        if together is not None and self._apart:
            return together
        alone = [self._attempt(feeds) for feeds in requests]
        if together is not None and _are_different(requests):
            self._apart = _are_close(together, alone)
        return alone

    def _stacked(self, requests: Sequence[Mapping[str, Float32]]) -> list[dict[str, Float32] | RunFailed] | None:
        """All in one run; None where that fails, so that each fails for its own reason; one alone takes less memory."""
        ends = np.cumsum([len(next(iter(feeds.values()))) for feeds in requests])
        try:
            found = self._run(
                {name: np.concatenate([each[name] for each in requests]) for name in self.inputs}, ends[-1]
            )
        except Overran:
            raise
        except (RunFailed, torch.OutOfMemoryError):
            return None
        parts = {name: np.split(output, ends[:-1]) for name, output in found.items()}
        return [{name: part[i] for name, part in parts.items()} for i in range(len(requests))]

    def _attempt(self, feeds: Mapping[str, Float32]) -> dict[str, Float32] | RunFailed:
        try:
            return dict(self.run(feeds))
        except Overran:
            raise
        except RunFailed as failed:
            return failed

    def _run(self, feeds: Mapping[str, Float32], rows: int, limit_s: float | None = None) -> dict[str, Float32]:
        limit_s = self._forward_s if limit_s is None else min(limit_s, self._forward_s)
        options = self._runtime.RunOptions()
        started = time.monotonic()
        failed: Exception | None = None
        try:
            with _WATCHDOG.watching(options, started + limit_s):
                outputs = self._session.run(None, dict(feeds), options)
        except Exception as error:
            if not options.terminate:
                failed = self._read_failure(error)
        if failed is not None:
            raise failed  # out of the handler: the runtime's error would keep its frames, and they what is to be freed
        if time.monotonic() - started > limit_s:
            raise Overran(f"a run was ended after {limit_s:g} s, the most that one may take (max_forward_s)")
        for name, output in zip(self.outputs, outputs, strict=True):
            if output.ndim == 0 or len(output) != rows:
                raise RunFailed(f"output {name!r} has the shape {list(output.shape)}, but {rows} rows were asked")
        return dict(zip(self.outputs, outputs, strict=True))

    def _read_failure(self, error: Exception) -> Exception:
        return onnx_cuda.read_failure(error) if self._on_cuda else RunFailed(f"ONNX Runtime: {error}")


def _open_session(
    runtime: ModuleType, model: bytes, threads: int, provider: Provider, limit: int, *, tf32: bool
) -> Any:
    """A session of these bytes. Raises as `OnnxModel` does."""
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.add_session_config_entry("session.use_env_allocators", "1")
    options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")  # not in the arena
    options.log_severity_level = 4  # errors reach us as exceptions
    options.add_session_config_entry("session.load_model_format", "ONNX")  # its own format is not checked before
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    places: list[Any] = ["CPUExecutionProvider"]  # on CUDA for operators that it has not, such as those of shapes
    if provider == "cuda":
        places.insert(0, (onnx_cuda.PROVIDER, onnx_cuda.make_options(limit, tf32=tf32)))
    with _unnamed_file(model) as path:
        try:
            session = runtime.InferenceSession(
                path,
                options,
                providers=places,
                disabled_optimizers=["ConstantFolding"],
                enable_fallback=0,  # to a session on the CPU, without what is disabled, now or after an error of CUDA
            )
        except Exception as error:
            raise _read_load_failure(error, provider, path) from error
    if provider == "cuda":
        onnx_cuda.require_placed(session)
    return session


def _read_load_failure(error: Exception, provider: Provider, path: str) -> Exception:
    found = onnx_cuda.read_failure(error) if provider == "cuda" else RunFailed(f"ONNX Runtime: {error}")
    if not isinstance(found, RunFailed):
        return found
    return ArchiveInvalid(f"model.onnx: it cannot be loaded: {str(found).replace(path, ONNX_FILE)}")


def _can_stack(requests: Sequence[Mapping[str, Float32]]) -> bool:
    """Whether open axes have the same lengths in all."""
    first = {name: array.shape[1:] for name, array in requests[0].items()}
    return all({name: array.shape[1:] for name, array in feeds.items()} == first for feeds in requests[1:])


def _are_different(requests: Sequence[Mapping[str, Float32]]) -> bool:
    """Whether no two requests are equal, so that a mixing graph shows itself."""
    return len({b"".join(array.tobytes() for array in feeds.values()) for feeds in requests}) == len(requests)


def _are_close(
    together: Sequence[dict[str, Float32] | RunFailed], alone: Sequence[dict[str, Float32] | RunFailed]
) -> bool:
    for a, b in zip(together, alone, strict=True):
        if isinstance(a, RunFailed) or isinstance(b, RunFailed):
            return False
        if any(a[name].shape != b[name].shape or not np.allclose(a[name], b[name], RTOL, ATOL) for name in b):
            return False
    return True


class _Watchdog:
    """Ends runs of sessions at their deadline, on a thread of its own. Thread-safe; one for the process."""

    def __init__(self) -> None:
        self._deadlines: dict[int, tuple[Any, float]] = {}
        self._some = threading.Event()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    @contextmanager
    def watching(self, options: Any, deadline: float) -> Iterator[None]:
        """Set `options.terminate`, which ONNX Runtime looks at before every operator, if this lasts until then."""
        self._deadlines[id(options)] = options, deadline
        if not self._some.is_set():
            self._start()
        try:
            yield
        finally:
            del self._deadlines[id(options)]

    def _start(self) -> None:
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._watch, name="onnx-watchdog", daemon=True)
                self._thread.start()
        self._some.set()

    def _watch(self) -> None:
        while True:
            self._some.wait()
            time.sleep(WATCH_S)
            self._some.clear()  # first: a run that begins now sets it again
            for options, deadline in list(self._deadlines.values()):
                self._some.set()
                if time.monotonic() > deadline:
                    options.terminate = True


@contextmanager
def _unnamed_file(model: bytes) -> Iterator[str]:
    """The path of a file in memory with these bytes, as long as this lasts.

    ONNX Runtime holds the interpreter's lock while it reads a model from bytes (17 to 99 ms for 64 MiB), but not while
    it reads a file (4 to 9 ms). Beside an unnamed file there are no others that a model could name.
    """
    descriptor = os.memfd_create("model.onnx")
    try:
        with open(descriptor, "wb", closefd=False, buffering=0) as file:
            view = memoryview(model)
            while view:
                view = view[file.write(view) or 0 :]
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)


_WATCHDOG = _Watchdog()
_arenas_lock, _arenas = threading.Lock(), set[Provider]()
_measuring = threading.Lock()


def _share_arenas(runtime: ModuleType, limit: int, provider: Provider) -> None:
    """Make the arenas for the intermediate results of all sessions; the first limit in a process is the one that holds.

    Between runs they keep the memory that they have had, up to the limit.
    """
    with _arenas_lock:
        if "cpu" not in _arenas:
            kinds = runtime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, runtime.OrtMemType.DEFAULT
            as_asked = {"max_mem": limit, "arena_extend_strategy": 1}
            runtime.create_and_register_allocator(runtime.OrtMemoryInfo("Cpu", *kinds), runtime.OrtArenaCfg(as_asked))
            _arenas.add("cpu")
        if provider == "cuda" and "cuda" not in _arenas:
            onnx_cuda.share_device_arena(runtime, limit)
            _arenas.add("cuda")


@contextmanager
def _measured_growth(provider: Provider) -> Iterator[list[int]]:
    """The bytes that this process has grown by inside, or the device's free memory shrunk, in the list at the end.

    Others' memory counts too, so it is an upper bound. On CUDA, where it is always of use, no two sessions are measured
    at the same time.
    """
    found = [0]
    if provider == "cuda":
        with _measuring:
            free = onnx_cuda.read_free_bytes()
            yield found
            found[0] = max(0, free - onnx_cuda.read_free_bytes())
        return
    before = _own_bytes()
    yield found
    found[0] = max(0, _own_bytes() - before)


def _own_bytes() -> int:
    """Memory of this process that is no file's."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123 -- 10 us instead of 30
            _, resident, shared, *_ = map(int, file.read().split())
    except OSError:
        return 0
    return (resident - shared) * PAGE


def _check_shape(what: str, value: Any) -> Shape:
    """Of an input or output, -1 where open. Raises ArchiveInvalid unless float32 with a usable batch axis."""
    if value.type != "tensor(float)":
        raise ArchiveInvalid(f"model.onnx: {what} {value.name!r} is {value.type}; only float32 tensors are served")
    shape = tuple(n if isinstance(n, int) and n >= 0 else -1 for n in value.shape)
    if what == "input" and (not shape or shape[0] not in (-1, 1)):
        raise ArchiveInvalid(f"model.onnx: input {value.name!r} {list(shape)} needs a batch axis first, dynamic or 1")
    return shape


def _import_runtime(provider: Provider) -> ModuleType:
    """The onnxruntime module. Raises UnsupportedKind that names the extra to install."""
    try:
        onnxruntime: ModuleType = import_module("onnxruntime")  # here: an optional extra, 0.1 s of import
    except ImportError as error:
        raise UnsupportedKind(f"onnx archives need ONNX Runtime: install fleetcast[{provider}]") from error
    if provider == "cuda":
        onnx_cuda.require_cuda(onnxruntime)
    return onnxruntime

"""Archives of kind onnx: one ONNX Runtime session a model, float32 in and out, and no file is read but its bytes."""

import os
import re
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import Any, Literal

import numpy as np

from handlers.base import Float32, Shape
from handlers.codecs.codec import SingleCodec
from handlers.errors import DeviceFailed, Overran, RunFailed
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
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}

SESSION_BYTES = 320 * 1024
BYTES_PER_MODEL_BYTE = 1.25
MEASURED_BYTES = 8 * 2**20  #: growth of the process below this says nothing of a session
WATCH_S = 0.02  #: how late a run that takes too long may be ended
MOST_TOGETHER = 32 * 2**20  #: bytes of inputs in one run
_PREFIX = re.compile(r"\[ONNXRuntimeError\] : \d+ : \w+ : ")
#: As ONNX Runtime begins its messages of CUDA and its libraries: `CUDA failure 700: an illegal memory access ...`.
_CUDA_FAILURE = re.compile(r"(CUDA|CUDNN|CUBLAS|CUFFT) (failure|error)\b", re.IGNORECASE)
_NO_MEMORY = re.compile(r"out of memory|failed to allocate|ALLOC_FAILED", re.IGNORECASE)
_FAILED_BEFORE = re.compile(r"EXECUTION_FAILED|INTERNAL_ERROR|MAPPING_ERROR", re.IGNORECASE)
ATOL, RTOL = 1e-5, 1e-4  #: within which answers run together equal those run alone


class OnnxKind:
    """See ArchiveKind."""

    kind = Kind.ONNX

    def recognises(self, archive: Archive) -> bool:
        """By the ONNX file that the MAR manifest names, or `model.onnx`."""
        return find_onnx_file(archive) in archive.container.members

    def build(self, archive: Archive, target: Target) -> BuiltModel:
        """A session on the target's device. Raises ArchiveInvalid, UnsupportedKind."""
        model = OnnxModel(_read_file(archive), threads=target.threads, provider=target.device, limits=target.sessions)
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


class OnnxModel:
    """A loaded session. `run` may be called by one thread at a time.

    The charge is 320 KiB + 1.25 x the model's bytes: private memory grew by 394 KiB a session for 50 sessions of the
    17.5k-parameter dilated CNN (78 KiB of model) and by 1257 KiB at 128 channels (858 KiB), one run done in each, with
    onnxruntime 1.31 on CPU, one thread and no arena. An arena added 147 and 344 KiB and was not faster. On CUDA this
    covers the weights, not the provider's workspace. A session that made the process grow by much more than that (its
    weights unpacked, or packed anew for products) is charged what was measured.

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
    ) -> None:
        """Builds the session from the bytes of `model.onnx`.

        Raises:
            ArchiveInvalid: not an ONNX model, external data, a loop where none is allowed, a sparse tensor that is
                too large once it is dense, inputs or outputs that are not float32 tensors with a
                batch axis first (dynamic, or fixed at 1: such a model runs row by row).
            UnsupportedKind: ONNX Runtime or the wanted provider is not installed.
        """
        self.loops = check_model(model, loops=limits.loops)  #: so its time does not follow from its input's size
        runtime = _import_runtime(provider)
        options = runtime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        _share_arena(runtime, limits.memory_bytes)
        options.add_session_config_entry("session.use_env_allocators", "1")
        options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")  # not in the arena
        options.log_severity_level = 4  # errors reach us as exceptions
        options.add_session_config_entry("session.load_model_format", "ONNX")  # its own format is not checked above
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        with _measured_growth() as grown, _unnamed_file(model) as path:
            try:
                self._session: Any = runtime.InferenceSession(
                    path, options, providers=[PROVIDERS[provider]], disabled_optimizers=["ConstantFolding"]
                )
            except Exception as error:
                if provider == "cuda" and is_device_failure(str(error)):
                    raise DeviceFailed(f"ONNX Runtime: {error}") from error
                why = str(error).replace(path, ONNX_FILE)
                raise ArchiveInvalid(f"model.onnx: ONNX Runtime cannot load it: {why}") from error
        self._forward_s, self._run_options, self._provider = limits.forward_s, runtime.RunOptions, provider
        taken = {each.name: _check_shape("input", each) for each in self._session.get_inputs()}
        given = {each.name: _check_shape("output", each) for each in self._session.get_outputs()}
        if not taken or not given:
            raise ArchiveInvalid("model.onnx: a model needs at least one input and one output")
        self.inputs: Mapping[str, Shape] = {name: shape[1:] for name, shape in taken.items()}
        self.outputs: Sequence[str] = tuple(given)
        self._row_by_row = any(shape[0] == 1 for shape in taken.values())
        self._apart: bool | None = False if self._row_by_row else None  # whether requests run together stay apart
        usual = SESSION_BYTES + int(BYTES_PER_MODEL_BYTE * len(model))
        self.charge_bytes = usual if grown[0] < 2 * usual + MEASURED_BYTES else grown[0]

    def __repr__(self) -> str:
        how = "row by row" if self._row_by_row else "batched"
        return f"<OnnxModel {dict(self.inputs)} -> {', '.join(self.outputs)}, {how}>"

    def run(self, feeds: Mapping[str, Float32]) -> Mapping[str, Float32]:
        """Arrays [N, *shape] by input name -> arrays [N, ...] by output name.

        Raises RunFailed, Overran, DeviceFailed.
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
        """All in one run; None where that fails, so that each fails for its own reason."""
        ends = np.cumsum([len(next(iter(feeds.values()))) for feeds in requests])
        try:
            found = self._run(
                {name: np.concatenate([each[name] for each in requests]) for name in self.inputs}, ends[-1]
            )
        except Overran:
            raise
        except RunFailed:
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

    def _run(self, feeds: Mapping[str, Float32], rows: int) -> dict[str, Float32]:
        options = self._run_options()
        started = time.monotonic()
        try:
            with _WATCHDOG.watching(options, started + self._forward_s):
                outputs = self._session.run(None, dict(feeds), options)
        except Exception as error:
            if self._provider == "cuda" and is_device_failure(str(error)):
                raise DeviceFailed(f"ONNX Runtime: {error}") from error
            if not options.terminate:
                raise RunFailed(f"ONNX Runtime: {error}") from error
        if time.monotonic() - started > self._forward_s:
            raise Overran(f"a run was ended after {self._forward_s:g} s, the most that one may take (max_forward_s)")
        for name, output in zip(self.outputs, outputs, strict=True):
            if output.ndim == 0 or len(output) != rows:
                raise RunFailed(f"output {name!r} has the shape {list(output.shape)}, but {rows} rows were asked")
        return dict(zip(self.outputs, outputs, strict=True))


def is_device_failure(message: str) -> bool:
    """Whether ONNX Runtime's message says that CUDA fails from now on, which being out of memory does not.

    Only what follows the last `Status Message:` counts, since the names in front of it are the archive's.
    """
    said = _PREFIX.sub("", message.rpartition("Status Message:")[2].strip(), count=1)
    found = _CUDA_FAILURE.match(said)
    if found is None or _NO_MEMORY.search(said):
        return False
    return found[1].upper() == "CUDA" or _FAILED_BEFORE.search(said) is not None


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
_arenas_lock, _arenas = threading.Lock(), list[int]()


def _share_arena(runtime: ModuleType, limit: int) -> None:
    """Make the arena for the intermediate results of all sessions; the first limit in a process is the one that holds.

    Between runs it keeps the memory that it has had, up to the limit.
    """
    with _arenas_lock:
        if _arenas:
            return
        kinds = runtime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, runtime.OrtMemType.DEFAULT
        as_asked = {"max_mem": limit, "arena_extend_strategy": 1}
        runtime.create_and_register_allocator(runtime.OrtMemoryInfo("Cpu", *kinds), runtime.OrtArenaCfg(as_asked))
        _arenas.append(limit)


@contextmanager
def _measured_growth() -> Iterator[list[int]]:
    """The bytes that this process has grown by inside, in the list at the end.

    Other threads' memory counts too, so it is an upper bound, of use where a session takes far more than is usual.
    """
    found, before = [0], _own_bytes()
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
    extra = f"fleetcast[{provider}]"
    try:
        onnxruntime: ModuleType = import_module("onnxruntime")  # here: an optional extra, 0.1 s of import
    except ImportError as error:
        raise UnsupportedKind(f"onnx archives need ONNX Runtime: install {extra}") from error
    if PROVIDERS[provider] not in onnxruntime.get_available_providers():
        raise UnsupportedKind(f"this ONNX Runtime has no {PROVIDERS[provider]}: install {extra}")
    return onnxruntime

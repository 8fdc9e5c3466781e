"""The model of an onnx archive: one ONNX Runtime session, tensors in and out, and no file is read but its bytes."""

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from handlers.base import Shape
from handlers.codecs.datatypes import BF16, DATATYPES, FP32, Array
from handlers.errors import Overran, RunFailed
from handlers.kinds.onnx import cuda
from handlers.kinds.onnx.scan import check_model
from handlers.kinds.onnx.session import (
    Provider,
    check_shape,
    import_runtime,
    measure_growth,
    open_session,
    read_types,
    run_with_bit_patterns,
    share_arenas,
)
from handlers.kinds.onnx.watchdog import WATCHDOG
from handlers.work import SessionLimits
from model_store.errors import ArchiveInvalid

LIMITS = SessionLimits()

SESSION_BYTES = 320 * 1024
BYTES_PER_MODEL_BYTE = 1.25
MEASURED_BYTES = 8 * 2**20  #: growth of the process below this says nothing of a session
PROBE_S = 1.0  #: most that the run of a load takes, which measures and has libraries make what they need
MOST_TOGETHER = 32 * 2**20  #: bytes of inputs in one run
ATOL, RTOL = 1e-5, 1e-4  #: within which answers run together equal those run alone


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
                too large once it is dense, inputs or outputs that are not tensors with a
                batch axis first (dynamic, or fixed at 1: such a model runs row by row).
            UnsupportedKind: ONNX Runtime or the wanted provider is not installed, or gives a session somewhere else.
            torch.OutOfMemoryError: the device is full.
            DeviceFailed: the device is lost.
        """
        self.loops = check_model(model, loops=limits.loops)  #: so its time does not follow from its input's size
        self._runtime, self._forward_s, self._on_cuda = import_runtime(provider), limits.forward_s, provider == "cuda"
        share_arenas(self._runtime, limits.memory_bytes, provider)
        with measure_growth(provider) as grown:
            self._session: Any = open_session(self._runtime, model, threads, provider, limits.memory_bytes, tf32=tf32)
            self._describe()
            if provider == "cuda":
                self._run_first()
        usual = SESSION_BYTES + int(BYTES_PER_MODEL_BYTE * len(model))
        noise = 0 if provider == "cuda" else usual + MEASURED_BYTES
        self.charge_bytes = usual if grown[0] < usual + noise else grown[0]

    def _describe(self) -> None:
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        taken = {each.name: check_shape("input", each) for each in inputs}
        given = {each.name: check_shape("output", each) for each in outputs}
        self.types: Mapping[str, str] = read_types([*inputs, *outputs])  #: datatypes of those that are not FP32
        if not taken or not given:
            raise ArchiveInvalid("model.onnx: a model needs at least one input and one output")
        self.inputs: Mapping[str, Shape] = {name: shape[1:] for name, shape in taken.items()}
        self.outputs: Mapping[str, Shape] = {name: shape[1:] for name, shape in given.items()}
        self._row_by_row = any(shape[0] == 1 for shape in taken.values())
        # whether requests run together stay apart; strings are not compared, so models with some run one by one
        self._apart: bool | None = False if self._row_by_row or "BYTES" in self.types.values() else None

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

    def _ones(self) -> dict[str, Array]:
        shapes = {name: [1, *(max(1, length) for length in shape)] for name, shape in self.inputs.items()}
        types = {name: DATATYPES[self.types.get(name, FP32)] for name in shapes}
        return {
            name: np.full(shape, "1" if types[name].kind == "string" else 1, types[name].dtype)
            for name, shape in shapes.items()
        }

    def run(self, feeds: Mapping[str, Array]) -> Mapping[str, Array]:
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

    def run_all(self, requests: Sequence[Mapping[str, Array]]) -> list[dict[str, Array] | RunFailed]:
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

    def _stacked(self, requests: Sequence[Mapping[str, Array]]) -> list[dict[str, Array] | RunFailed] | None:
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

    def _attempt(self, feeds: Mapping[str, Array]) -> dict[str, Array] | RunFailed:
        try:
            return dict(self.run(feeds))
        except Overran:
            raise
        except RunFailed as failed:
            return failed

    def _run(self, feeds: Mapping[str, Array], rows: int, limit_s: float | None = None) -> dict[str, Array]:
        limit_s = self._forward_s if limit_s is None else min(limit_s, self._forward_s)
        options = self._runtime.RunOptions()
        started = time.monotonic()
        failed: Exception | None = None
        try:
            with WATCHDOG.watching(options, started + limit_s):
                if BF16 in self.types.values():
                    outputs = run_with_bit_patterns(self._runtime, self._session, feeds, self.types, options)
                else:
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
        return cuda.read_failure(error) if self._on_cuda else RunFailed(f"ONNX Runtime: {error}")


def _can_stack(requests: Sequence[Mapping[str, Array]]) -> bool:
    """Whether open axes have the same lengths in all."""
    first = {name: array.shape[1:] for name, array in requests[0].items()}
    return all({name: array.shape[1:] for name, array in feeds.items()} == first for feeds in requests[1:])


def _are_different(requests: Sequence[Mapping[str, Array]]) -> bool:
    """Whether no two requests are equal, so that a mixing graph shows itself."""
    return len({b"".join(array.tobytes() for array in feeds.values()) for feeds in requests}) == len(requests)


def _are_close(together: Sequence[dict[str, Array] | RunFailed], alone: Sequence[dict[str, Array] | RunFailed]) -> bool:
    for a, b in zip(together, alone, strict=True):
        if isinstance(a, RunFailed) or isinstance(b, RunFailed):
            return False
        if any(a[name].shape != b[name].shape or not np.allclose(a[name], b[name], RTOL, ATOL) for name in b):
            return False
    return True

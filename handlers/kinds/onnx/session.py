"""How a session of ONNX Runtime is opened: its options, the memory that all sessions share, and what a new one took.

Any thread may call it.
"""

import ctypes
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from math import prod
from types import ModuleType
from typing import Any, Literal

import numpy as np

from handlers.base import Shape
from handlers.codecs.datatypes import BF16, BYTES, Array
from handlers.errors import RunFailed
from handlers.kinds.onnx import cuda
from model_store.errors import ArchiveInvalid, UnsupportedKind

Provider = Literal["cpu", "cuda"]
ONNX_SUFFIX = ".onnx"
ONNX_FILE = f"model{ONNX_SUFFIX}"
PAGE = os.sysconf("SC_PAGE_SIZE")
BFLOAT16 = 16  #: of `TensorProto.DataType` in onnx.proto


def open_session(runtime: ModuleType, model: bytes, threads: int, provider: Provider, limit: int, *, tf32: bool) -> Any:
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
        places.insert(0, (cuda.PROVIDER, cuda.make_options(limit, tf32=tf32)))
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
        cuda.require_placed(session)
    return session


def _read_load_failure(error: Exception, provider: Provider, path: str) -> Exception:
    found = cuda.read_failure(error) if provider == "cuda" else RunFailed(f"ONNX Runtime: {error}")
    if not isinstance(found, RunFailed):
        return found
    return ArchiveInvalid(f"model.onnx: it cannot be loaded: {str(found).replace(path, ONNX_FILE)}")


def run_with_bit_patterns(
    runtime: ModuleType, session: Any, feeds: Mapping[str, Array], types: Mapping[str, str], options: Any
) -> list[Array]:
    """As `session.run`, with BF16 as bit patterns: numpy has no such type, ONNX Runtime tells an address.

    It makes no values of its own of strings, and no arrays of BF16: a model that takes BYTES and gives BF16 cannot be
    asked. Raises RunFailed for one.
    """
    kept = {name: np.ascontiguousarray(array) for name, array in feeds.items()}
    given: dict[str, Any] = {
        name: runtime.OrtValue.ortvalue_from_numpy_with_onnx_type(array, BFLOAT16) if types.get(name) == BF16 else array
        for name, array in kept.items()
    }
    names = [each.name for each in session.get_outputs()]
    if all(each.type != "tensor(bfloat16)" for each in session.get_outputs()):
        found: list[Array] = session.run(names, given, options)
        return found
    if BYTES in (types.get(name) for name in feeds):
        raise RunFailed("no BF16 can be given for BYTES: cast the model's BF16 outputs to FP32, which holds them")
    make_value = runtime.OrtValue.ortvalue_from_numpy
    given = {name: make_value(kept[name]) if types.get(name) != BF16 else value for name, value in given.items()}
    outputs = session.run_with_ort_values(names, given, options)
    return [_copy_bits(each) if each.data_type() == "tensor(bfloat16)" else each.numpy() for each in outputs]


def _copy_bits(value: Any) -> Array:
    """The bit patterns of an OrtValue in the host's memory."""
    shape = tuple(value.shape())
    if not prod(shape):
        return np.empty(shape, np.uint16)
    shared = (ctypes.c_uint16 * prod(shape)).from_address(value.data_ptr())
    return np.frombuffer(shared, np.uint16).reshape(shape).copy()


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


_arenas_lock, _arenas = threading.Lock(), set[Provider]()
_measuring = threading.Lock()


def share_arenas(runtime: ModuleType, limit: int, provider: Provider) -> None:
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
            cuda.share_device_arena(runtime, limit)
            _arenas.add("cuda")


@contextmanager
def measure_growth(provider: Provider) -> Iterator[list[int]]:
    """The bytes that this process has grown by inside, or the device's free memory shrunk, in the list at the end.

    Others' memory counts too, so it is an upper bound. On CUDA, where it is always of use, no two sessions are measured
    at the same time.
    """
    found = [0]
    if provider == "cuda":
        with _measuring:
            free = cuda.read_free_bytes()
            yield found
            found[0] = max(0, free - cuda.read_free_bytes())
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


#: ONNX Runtime's names of the types that are served -> the datatypes of the Open Inference Protocol.
TENSOR_TYPES = {
    "tensor(float)": "FP32", "tensor(double)": "FP64", "tensor(float16)": "FP16", "tensor(bfloat16)": "BF16",
    "tensor(bool)": "BOOL", "tensor(string)": "BYTES",
    **{f"tensor({sign}int{bits})": f"{sign.upper()}INT{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)},
}  # fmt: skip


def read_types(values: Iterable[Any]) -> dict[str, str]:
    """The datatypes by name of the inputs and outputs that `check_shape` has checked, of those that are not FP32."""
    found = {each.name: TENSOR_TYPES[each.type] for each in values}
    return {name: datatype for name, datatype in found.items() if datatype != "FP32"}


def check_shape(what: str, value: Any) -> Shape:
    """Of an input or output, -1 where open. Raises ArchiveInvalid unless a tensor with a usable batch axis."""
    if value.type not in TENSOR_TYPES:
        served = ", ".join(TENSOR_TYPES)
        raise ArchiveInvalid(f"model.onnx: {what} {value.name!r} is {value.type}; served are {served}")
    shape = tuple(n if isinstance(n, int) and n >= 0 else -1 for n in value.shape)
    if what == "input" and (not shape or shape[0] not in (-1, 1)):
        raise ArchiveInvalid(f"model.onnx: input {value.name!r} {list(shape)} needs a batch axis first, dynamic or 1")
    return shape


def import_runtime(provider: Provider) -> ModuleType:
    """The onnxruntime module. Raises UnsupportedKind that names the extra to install."""
    try:
        onnxruntime: ModuleType = import_module("onnxruntime")  # here: an optional extra, 0.1 s of import
    except ImportError as error:
        raise UnsupportedKind(f"onnx archives need ONNX Runtime: install fleetcast[{provider}]") from error
    if provider == "cuda":
        cuda.require_cuda(onnxruntime)
    return onnxruntime

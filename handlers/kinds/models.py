"""What an archive becomes once it is built: a model that runs as a row of a bank, or one that runs alone.

Both kinds of model read a request, run it and write the answer; a worker only has to know which of the two it holds,
never which kind of archive the model came from.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import orjson
import torch

from handlers.base import Family, Float32, Shape, Single
from handlers.codecs.codec import JSON, Encoded, FamilyCodec, SingleCodec
from handlers.codecs.datatypes import FP32
from handlers.codecs.deepar import DeepAr
from handlers.codecs.joint import JointCodec, JointModel
from handlers.errors import RequestError, RunFailed
from handlers.golden import find_mismatch
from handlers.kinds.packing import ArchiveParts
from handlers.work import SessionLimits, WorkLimits
from model_store.archives.archive import Archive
from model_store.archives.manifest import GoldenSample, Kind, Spec
from model_store.errors import GoldenMismatch

#: Runs inputs [n, *input_shape] under one row of a family, on whatever device the caller has.
RunRow = Callable[[Family, Float32, Float32], Float32]


def run_row_on_cpu(family: Family, row: Float32, x: Float32) -> Float32:
    """Inputs x [n, *input_shape] under one row -> [n, *output_shape], in this thread."""
    block = torch.from_numpy(row)[None].expand(len(x), -1)
    with torch.inference_mode():
        answer = family.forward(family.bind(block), torch.from_numpy(x))
    found: Float32 = answer.numpy()
    return found


@dataclass(frozen=True, slots=True)
class Target:
    """Where a model will run: models that run alone are built for a device and a number of threads.

    `limits`: what one request may cost; `sessions`: what models that run alone may cost. `onnx_device` says where ONNX
    models run if the device is not the CPU, as the setting does, and `tf32` whether their products may be rounded.
    """

    device: Literal["cpu", "cuda"] = "cpu"
    threads: int = 1
    limits: WorkLimits = field(default_factory=WorkLimits)
    sessions: SessionLimits = field(default_factory=SessionLimits)
    onnx_device: Literal["auto", "cpu", "device"] = "auto"
    tf32: bool = False


class _Call(Protocol):
    @property
    def encode(self) -> Callable[[Any], Encoded]: ...


class _Codec(Protocol):
    def decode(self, body: bytes | memoryview, content_type: str, accept: str) -> _Call: ...


def prove_golden(name: str, golden: GoldenSample, codec: _Codec, run: Callable[[Any], Any]) -> None:
    """Check that `run` answers the golden sample as the archive says.

    `run` takes what `codec.decode` gives and returns what that call's `encode` takes; `name` is for the message.

    Raises:
        GoldenMismatch: the sample cannot be run, or its answer differs; the message names the first number that is off.
    """
    try:
        call = codec.decode(orjson.dumps(golden.request), JSON, JSON)
        answer, _ = call.encode(run(call))
    except (RequestError, RunFailed) as error:
        raise GoldenMismatch(f"{name}: the golden sample cannot be run: {error}") from error
    difference = find_mismatch(golden.response, orjson.loads(answer), golden.abs_tolerance, golden.rel_tolerance)
    if difference:
        raise GoldenMismatch(f"{name}: the golden sample is not reproduced: {difference}")


@dataclass(frozen=True, slots=True)
class RowModel:
    """A model of a family: its numbers are one row of a bank, which is kept elsewhere."""

    family: Family
    codec: FamilyCodec
    one_by_one: str = ""  #: why its rows cannot run together with those of other models; empty where they can
    forecaster: DeepAr | None = field(init=False, repr=False, compare=False)  #: its codec's, at hand for calls of many

    def __post_init__(self) -> None:
        object.__setattr__(self, "forecaster", self.codec.forecaster)

    @property
    def family_key(self) -> str | None:
        """The key of its family: models with equal keys can share a forward."""
        return self.family.key

    def charge_bytes(self, row: Float32 | None) -> int:
        """Bytes that the model's row takes in the cache's budget."""
        assert row is not None, "a row model is built with its row"
        return row.nbytes

    def prove(self, name: str, golden: GoldenSample, row: Float32 | None, run_row: RunRow = run_row_on_cpu) -> None:
        """Run the golden sample under `row`. Raises GoldenMismatch that names the first number that is off."""
        prove_golden(name, golden, self.codec, lambda call: self.run(call, row, run_row))

    def run(self, call: Any, row: Float32 | None, run_row: RunRow = run_row_on_cpu) -> Any:
        """What the call's `encode` takes, for a call that this model's codec has decoded."""
        assert row is not None, "a row model is built with its row"
        return run_row(self.family, row, call.rows)

    def run_all(self, calls: Sequence[Any], row: Float32 | None) -> Sequence[Any]:
        """As `run` on the CPU for each of one or more calls, in one forward."""
        assert row is not None, "a row model is built with its row"
        outputs = run_row_on_cpu(self.family, row, np.concatenate([call.rows for call in calls]))
        return np.split(outputs, np.cumsum([len(call.rows) for call in calls])[:-1])


@dataclass(frozen=True, slots=True)
class SingleModel:
    """A model that runs alone."""

    single: Single | JointModel
    codec: SingleCodec | JointCodec
    unbounded: bool = False  #: whether a request's numbers may say how long it runs: the graph has loops

    @property
    def family(self) -> None:
        """None: it belongs to no family."""
        return None

    @property
    def family_key(self) -> str | None:
        """None: it belongs to no family."""
        return None

    def charge_bytes(self, row: Float32 | None) -> int:
        """Bytes that the model takes in the cache's budget; `row` is None."""
        assert row is None, "a model that runs alone has no row"
        return self.single.charge_bytes

    def prove(self, name: str, golden: GoldenSample, row: Float32 | None, run_row: RunRow = run_row_on_cpu) -> None:
        """Run the golden sample; `row` and `run_row` are not used. Raises GoldenMismatch."""
        prove_golden(name, golden, self.codec, lambda call: self.run(call, row, run_row))

    def run(self, call: Any, row: Float32 | None, run_row: RunRow = run_row_on_cpu) -> Any:
        """What the call's `encode` takes, for a call that this model's codec has decoded. Raises RunFailed."""
        del row, run_row
        run: Callable[[Any], Any] = self.single.run
        return run(call.feeds)

    def run_all(self, calls: Sequence[Any], row: Float32 | None) -> Sequence[Any]:
        """As `run` for each of the calls, or the RunFailed that it raises. Raises Overran."""
        del row
        run_all: Callable[[Any], Sequence[Any]] = self.single.run_all
        return run_all([call.feeds for call in calls])


@dataclass(frozen=True, slots=True)
class BuiltModel:
    """What a kind builds of an archive: how the model runs, its row where it has one, and its summary for people."""

    body: RowModel | SingleModel
    row: Float32 | None
    summary: str  #: such as `tcn-4f1c2a9b0d3e5a71`: what runs, and for a graph how its rows run

    @property
    def charge_bytes(self) -> int:
        """Bytes that it takes in the cache's budget."""
        return self.body.charge_bytes(self.row)


class TensorInput(NamedTuple):
    """An input of a tensor request: the shape of one row, -1 where the model leaves a length open, and its datatype."""

    shape: Shape
    datatype: str = FP32  #: as the Open Inference Protocol names it


class ArchiveKind(Protocol):
    """One kind of archive. An entry has no state; its methods raise LoadErrors that need not name the archive."""

    @property
    def kind(self) -> Kind:
        """The name that `fleetcast.json` gives it."""

    def recognises(self, archive: Archive) -> bool:
        """Whether an archive without `fleetcast.json`, which would say so, is of this kind."""

    def build(self, archive: Archive, target: Target) -> BuiltModel:
        """The model, everything checked but its golden sample. Raises LoadError."""

    def tensor_inputs(self, archive: Archive) -> Mapping[str, TensorInput]:
        """The inputs of a tensor request by name; empty where the kind takes no tensors. Raises LoadError."""

    def describe(self, archive: Archive) -> dict[str, Any]:
        """What `fleetcast inspect` says beyond the records, as JSON values by section. Raises LoadError."""

    def pack(self, parts: ArchiveParts) -> tuple[Spec, Mapping[str, bytes]]:
        """The record and the members of a new archive. Raises UnsupportedKind where this version packs none."""

"""What a new archive is packed of. Each kind takes the parts that it needs; see `ArchiveKind.pack`."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from msgspec import UNSET, UnsetType

from handlers.base import Float32
from model_store.archives.manifest import CorrelationSpec, ForecastSpec, Setting
from model_store.archives.packing import save_tensors


@dataclass(frozen=True, slots=True, kw_only=True)
class ArchiveParts:
    """The parts of a new archive.

    `tensors`: numbers by name, or a safetensors file's bytes. `program`: a graph's operators, as
    `handlers.kinds.graph.export` makes them of a module, or an ONNX file; packing does not check either. The other
    parts are records of `fleetcast.json`.
    """

    tensors: Mapping[str, Float32] | bytes = b""
    program: bytes = b""
    architecture: str = ""
    config: Mapping[str, Setting] = field(default_factory=dict)
    forecast: ForecastSpec | None = None
    correlation: CorrelationSpec | UnsetType = UNSET
    trained_until: str | UnsetType = UNSET
    trained_epochs: float | UnsetType = UNSET
    trained_half_life: float | UnsetType = UNSET
    fingerprint: str | UnsetType = UNSET

    def save_tensors(self) -> bytes:
        """The numbers as a safetensors file."""
        return self.tensors if isinstance(self.tensors, bytes) else save_tensors(self.tensors)

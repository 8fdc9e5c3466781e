"""Archives of kind correlation: how the errors of several models' forecasts move together. No torch."""

from collections.abc import Mapping
from typing import Any

from handlers.codecs.joint import JointCodec, JointModel
from handlers.codecs.scenarios import load_correlation
from handlers.kinds.models import BuiltModel, SingleModel, Target, TensorInput
from handlers.kinds.packing import ArchiveParts
from model_store.archives.archive import Archive, list_tensor_shapes, read_tensors
from model_store.archives.manifest import Kind, Spec, Weights
from model_store.archives.packing import WEIGHTS_FILE


class CorrelationKind:
    """See ArchiveKind."""

    kind = Kind.CORRELATION

    def recognises(self, archive: Archive) -> bool:
        """Never: `fleetcast.json` says so."""
        del archive
        return False

    def build(self, archive: Archive, target: Target) -> BuiltModel:
        """A model that turns quantile forecasts into joint scenarios. Raises ArchiveInvalid."""
        del target  # numpy runs it
        assert archive.spec is not None, "a correlation is known by its fleetcast.json"
        assert archive.spec.correlation, "the record demands it"
        correlation = load_correlation(archive.spec.correlation, read_tensors(archive))
        return BuiltModel(SingleModel(JointModel(correlation), JointCodec(correlation)), None, repr(correlation))

    def tensor_inputs(self, archive: Archive) -> Mapping[str, TensorInput]:
        """None: it takes forecasts."""
        del archive
        return {}

    def describe(self, archive: Archive) -> dict[str, Any]:
        """The shapes of its tensors. Raises ArchiveInvalid."""
        return {"tensors": list_tensor_shapes(archive)}

    def pack(self, parts: ArchiveParts) -> tuple[Spec, Mapping[str, bytes]]:
        """The `correlation`, as `handlers.evaluation.correlation` estimates it, and its factors as `tensors`."""
        spec = Spec(kind=self.kind, weights=Weights(file=WEIGHTS_FILE), correlation=parts.correlation)
        return spec, {WEIGHTS_FILE: parts.save_tensors()}

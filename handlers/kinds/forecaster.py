"""Archives of kind forecaster: one of our own network architectures, its numbers as safetensors."""

from collections.abc import Mapping
from typing import Any

from handlers.base import Family, Float32
from handlers.codecs.calibration import BandCalibration
from handlers.codecs.codec import FamilyCodec
from handlers.forecasters import get_family
from handlers.forecasters.mixture import describe_mixture
from handlers.kinds.models import BuiltModel, RowModel, Target, TensorInput
from handlers.kinds.packing import ArchiveParts
from handlers.kinds.row_work import row_work
from handlers.work import RequestBudget
from model_store.archives.archive import (
    Archive,
    check_tensors,
    list_tensor_shapes,
    read_offsets,
    read_tensors,
    view_tensors,
)
from model_store.archives.manifest import Kind, Spec, Weights
from model_store.archives.packing import WEIGHTS_FILE


class ForecasterKind:
    """See ArchiveKind."""

    kind = Kind.FORECASTER

    def recognises(self, archive: Archive) -> bool:
        """Never: `fleetcast.json` says so."""
        del archive
        return False

    def build(self, archive: Archive, target: Target) -> BuiltModel:
        """A row of the architecture's family. Raises ArchiveInvalid."""
        assert archive.spec is not None, "a forecaster is known by its fleetcast.json"
        network = get_family(archive.spec)
        tensors = view_tensors(archive)
        check_tensors(tensors, network.parameters, archive.name)
        row = network.row(tensors)
        return BuiltModel(_make_model(archive, network, describe_mixture(network, tensors), target), row, network.key)

    def restore(self, archive: Archive, row: Float32, facts: Mapping[str, Any], target: Target) -> RowModel:
        """See `handlers.kinds.kept_rows.RowKind`."""
        del row
        assert archive.spec is not None, "a forecaster is known by its fleetcast.json"
        return _make_model(archive, get_family(archive.spec), facts, target)

    def tensor_inputs(self, archive: Archive) -> Mapping[str, TensorInput]:
        """The one input of its family. Raises ArchiveInvalid."""
        assert archive.spec is not None, "a forecaster is known by its fleetcast.json"
        network = get_family(archive.spec)
        return {network.input_name: TensorInput(network.input_shape)}

    def describe(self, archive: Archive) -> dict[str, Any]:
        """The shapes of its tensors, and the parts of a mixture. Raises ArchiveInvalid."""
        assert archive.spec is not None, "a forecaster is known by its fleetcast.json"
        found: dict[str, Any] = {"tensors": list_tensor_shapes(archive)}
        if archive.spec.architecture == "mixture":  # others are described too, also those that only later versions know
            found |= describe_mixture(get_family(archive.spec), read_tensors(archive))
        return found

    def pack(self, parts: ArchiveParts) -> tuple[Spec, Mapping[str, bytes]]:
        """The architecture, its configuration and `tensors`, the state dict of its reference network."""
        spec = Spec(
            kind=self.kind,
            weights=Weights(file=WEIGHTS_FILE),
            architecture=parts.architecture,
            config=dict(parts.config),
            forecast=parts.forecast,
            trained_until=parts.trained_until,
            trained_epochs=parts.trained_epochs,
            trained_half_life=parts.trained_half_life,
            fingerprint=parts.fingerprint,
        )
        return spec, {WEIGHTS_FILE: parts.save_tensors()}


def _make_model(archive: Archive, network: Family, facts: Mapping[str, Any], target: Target) -> RowModel:
    assert archive.spec is not None, "a forecaster is known by its fleetcast.json"
    budget = RequestBudget(row_work(network), target.limits)
    return RowModel(network, FamilyCodec(network, archive.spec.forecast, budget, open_calibration(archive), facts))


def read_row(archive: Archive, network: Family) -> Float32:
    """The archive's tensors as a row of the family. Raises ArchiveInvalid that lists the tensors that do not fit."""
    tensors = view_tensors(archive)
    check_tensors(tensors, network.parameters, archive.name)
    return network.row(tensors)


def open_calibration(archive: Archive) -> BandCalibration | None:
    """The calibration that an archive carries; None if it has none. Raises ArchiveInvalid."""
    offsets, spec = read_offsets(archive), archive.spec
    if offsets is None or spec is None or not spec.calibration or spec.forecast is None:
        return None
    return BandCalibration(spec.forecast, offsets, spec.calibration.low, spec.calibration.high)

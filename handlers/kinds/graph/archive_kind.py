"""Archives of kind graph: the operators of a user's network, and its numbers as safetensors."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import structlog

from handlers.base import Float32
from handlers.codecs.codec import FamilyCodec
from handlers.forecasters import check_forecast
from handlers.kinds.forecaster import open_calibration, read_row
from handlers.kinds.graph.family import GraphFamily, graph_family
from handlers.kinds.models import BuiltModel, RowModel, Target, TensorInput
from handlers.kinds.packing import ArchiveParts
from handlers.kinds.row_work import row_work
from handlers.work import RequestBudget
from model_store.archives.archive import Archive, list_tensor_shapes
from model_store.archives.manifest import FLEETCAST_JSON, GRAPH_FILE, Kind, Spec, Weights
from model_store.archives.packing import WEIGHTS_FILE
from model_store.errors import ArchiveInvalid

log = structlog.get_logger()


class GraphKind:
    """See ArchiveKind."""

    kind = Kind.GRAPH

    def recognises(self, archive: Archive) -> bool:
        """Never: `fleetcast.json` says so."""
        del archive
        return False

    def build(self, archive: Archive, target: Target) -> BuiltModel:
        """A row of the graph's family; its first archive decides how rows run. Raises ArchiveInvalid."""
        assert archive.spec is not None, "a graph is known by its fleetcast.json"
        network = graph_family(_read_program(archive))
        if archive.spec.forecast is not None:
            check_forecast(network, archive.spec.forecast)
        row = read_row(archive, network)
        return BuiltModel(self.restore(archive, row, {}, target), row, f"{network.key}, {network.runs}")

    def restore(self, archive: Archive, row: Float32, facts: Mapping[str, Any], target: Target) -> RowModel:
        """See `handlers.kinds.kept_rows.RowKind`. The family's first row decides how its rows run."""
        del facts
        assert archive.spec is not None, "a graph is known by its fleetcast.json"
        network = graph_family(_read_program(archive))
        budget = RequestBudget(row_work(network), target.limits)
        one_by_one = _decide_how_rows_run(network, row)
        codec = FamilyCodec(network, archive.spec.forecast, budget, open_calibration(archive))
        return RowModel(network, codec, one_by_one)

    def tensor_inputs(self, archive: Archive) -> Mapping[str, TensorInput]:
        """The one input of its family. Raises ArchiveInvalid."""
        network = graph_family(_read_program(archive))
        return {network.input_name: TensorInput(network.input_shape)}

    def describe(self, archive: Archive) -> dict[str, Any]:
        """The family, what goes in and out, how rows run, and its operators by how often they occur."""
        network = graph_family(_read_program(archive))
        network.decide(read_row(archive, network))
        operators = Counter(node.op for node in network.graph.nodes)
        graph = {
            "family": network.key,
            "input": {network.input_name: list(network.input_shape)},
            "output": list(network.output_shape),
            "runs": network.runs,
            "operators": dict(operators.most_common()),
        }
        return {"graph": graph, "tensors": list_tensor_shapes(archive)}

    def pack(self, parts: ArchiveParts) -> tuple[Spec, Mapping[str, bytes]]:
        """The `program` and its `tensors`."""
        spec = Spec(kind=self.kind, weights=Weights(file=WEIGHTS_FILE), forecast=parts.forecast)
        return spec, {GRAPH_FILE: parts.program, WEIGHTS_FILE: parts.save_tensors()}


def _read_program(archive: Archive) -> bytes:
    """The operators' record. Raises ArchiveInvalid where it is missing, damaged or too large."""
    if GRAPH_FILE not in archive.container.members:
        raise ArchiveInvalid(f"{FLEETCAST_JSON} says graph, but {GRAPH_FILE}, which holds the operators, is missing")
    return archive.read_record(GRAPH_FILE)


def _decide_how_rows_run(network: GraphFamily, row: Float32) -> str:
    """Why the graph's rows do not run together; tried and logged with its first archive. Raises ArchiveInvalid."""
    if network.one_by_one is None:
        network.decide(row)
        log.info("graph_family", family=network.key, runs=network.runs)
    return network.one_by_one or ""

"""Archives of kind onnx: which they are, where their session runs, and how one is packed."""

from collections.abc import Mapping
from typing import Any

from handlers.codecs.codec import SingleCodec
from handlers.codecs.datatypes import FP32
from handlers.kinds.models import BuiltModel, SingleModel, Target, TensorInput
from handlers.kinds.onnx.model import OnnxModel
from handlers.kinds.onnx.session import ONNX_FILE, ONNX_SUFFIX
from handlers.kinds.packing import ArchiveParts
from model_store.archives.archive import Archive
from model_store.archives.manifest import Kind, Spec, Weights

QUICK_S = 2e-3  #: a model whose row the CPU answers sooner gains nothing on a GPU: see DECISIONS


class OnnxKind:
    """See ArchiveKind."""

    kind = Kind.ONNX

    def recognises(self, archive: Archive) -> bool:
        """By the ONNX file that the MAR manifest names, or `model.onnx`."""
        return find_onnx_file(archive) in archive.container.members

    def build(self, archive: Archive, target: Target) -> BuiltModel:
        """A session where `place_session` says. Raises as `OnnxModel` does."""
        model = place_session(_read_file(archive), target)
        body = SingleModel(model, SingleCodec(model.inputs, model.outputs, model.types), unbounded=model.loops)
        return BuiltModel(body, None, "onnx")

    def tensor_inputs(self, archive: Archive) -> Mapping[str, TensorInput]:
        """The session's inputs. Raises ArchiveInvalid, UnsupportedKind."""
        model = OnnxModel(_read_file(archive))
        return {name: TensorInput(shape, model.types.get(name, FP32)) for name, shape in model.inputs.items()}

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


def place_session(model: bytes, target: Target) -> OnnxModel:
    """A session on the target's device, or on the CPU where the target says so or the model is quick there.

    Raises as `OnnxModel` does.
    """
    if target.device == "cpu" or target.onnx_device != "device":
        here = OnnxModel(model, threads=target.threads, limits=target.sessions)
        if target.device == "cpu" or target.onnx_device == "cpu" or here.time_row() < QUICK_S:
            return here
        del here  # its memory is free before the other is measured
    return OnnxModel(model, threads=target.threads, provider="cuda", limits=target.sessions, tf32=target.tf32)

"""What a worker and its template say to each other: msgpack, in tagged structs, one packet a message. Pure."""

import msgspec
from msgspec import Struct

from server.code_messages import ProtocolError

MAX_PACKET = 64 * 1024  #: of a message between worker and template


class ChildLimits(Struct, frozen=True):
    """What a child may take.

    `memory_bytes`: of address space beyond what the template has. `gpu`: it may use the GPU that its worker sees, and
    its address space has no limit then, because CUDA reserves far more of it than it takes memory.
    """

    memory_bytes: int
    cpu_s: float  #: of a load or a batch
    processes: int
    open_files: int = 256
    file_bytes: int = 1024 * 1024 * 1024
    gpu: bool = False


class Entry(Struct, frozen=True):
    """What the child imports; see `handlers.kinds.code.entry_point.EntryPoint`."""

    style: str
    module: str
    function: str
    folder: str
    from_package: bool


class ForkChild(Struct, frozen=True, tag=True):
    """To the template, with two descriptors: the child's end of its channel, and where its output goes.

    `folder` holds `model`, the archive's files, and `tmp`. `threads`: of torch. `packages`: where those that were
    installed for the archive are; empty where none were. `batch_size`: instead of the archive's own, and so
    `max_batch_delay_s`; 0: the archive's own. `envelope`: of an archive of TorchServe that names none; may be empty.
    `metrics`: the text of TorchServe's metrics.yaml; may be empty.
    """

    model: str
    folder: str
    entry: Entry
    limits: ChildLimits
    threads: int = 1
    packages: str = ""
    batch_size: int = 0
    max_batch_delay_s: float = 0.0
    envelope: str = ""
    metrics: str = ""


class TemplateReady(Struct, frozen=True, tag=True):
    """From the template, once it is warm. `problem`: why no child can run; `landlock`: its version, 0 for none."""

    problem: str
    landlock: int


class Forked(Struct, frozen=True, tag=True):
    """From the template: the answer to `ForkChild`, with the child's pidfd. `problem`: why there is no child."""

    pid: int = 0
    problem: str = ""


FromTemplate = TemplateReady | Forked

_encode = msgspec.msgpack.Encoder().encode
_decode_to_template = msgspec.msgpack.Decoder(ForkChild).decode
_decode_from_template = msgspec.msgpack.Decoder(FromTemplate).decode


def encode_packet(message: ForkChild | FromTemplate) -> bytes:
    """A message between worker and template. Raises ProtocolError for one that is too long."""
    packet = _encode(message)
    if len(packet) > MAX_PACKET:
        raise ProtocolError(f"a message of {len(packet)} bytes, {MAX_PACKET} are allowed")
    return packet


def decode_for_template(packet: bytes) -> ForkChild:
    """What the worker says. Raises ProtocolError."""
    try:
        return _decode_to_template(packet)
    except msgspec.MsgspecError as error:
        raise ProtocolError(str(error)) from error


def decode_from_template(packet: bytes) -> FromTemplate:
    """What the template says. Raises ProtocolError."""
    try:
        return _decode_from_template(packet)
    except msgspec.MsgspecError as error:
        raise ProtocolError(str(error)) from error

"""Says what a file of weights is, from its first bytes and the names in it. Pure: nothing of it is unpickled."""

from collections.abc import Iterator
from pathlib import PurePosixPath

from model_store.archives.archive import Archive
from model_store.errors import LoadError

ENDINGS = (
    ".pt", ".pth", ".pt2", ".bin", ".ckpt", ".onnx", ".safetensors", ".pkl", ".pickle", ".joblib", ".npz", ".h5",
    ".keras", ".params", ".json.gz", ".ubj", ".xgb", ".cbm", ".lgb",
)  # fmt: skip
MAX_FILES = 16
DIRECTORY_BYTES = 4 * 2**20  #: of the end of a zip, where its names are
MAX_ENTRIES = 65536
_ENTRY, _NAME_AT = b"PK\1\2", 46  #: of a zip's directory: the signature, and where the name begins


def find_model_files(archive: Archive) -> dict[str, str]:
    """Member -> what it is: the manifest's serialized file, and members whose names end as files of weights do."""
    serialized = archive.mar.model.serialized_file if archive.mar else ""
    named = [name for name in archive.members if name.endswith(ENDINGS) and name != serialized]
    members = [serialized] * (serialized in archive.container.members) + named
    return {name: _describe_member(archive, name) for name in members[:MAX_FILES]}


def _describe_member(archive: Archive, name: str) -> str:
    try:
        return describe_model_file(archive.read(name), name)
    except LoadError as error:
        return f"damaged: {error}"


def describe_model_file(raw: bytes | memoryview | bytearray, name: str) -> str:
    """What the bytes are, in words."""
    head = bytes(raw[:16])
    if head.startswith(b"PK"):
        return _describe_zip(bytes(raw), name)
    if head[:1] == b"\x80" and len(head) > 1:
        is_torch = b"l\xfc\x9cF\xf9 j\xa8P\x19." in bytes(raw[:64])
        return "weights of torch.save before torch 1.6 (pickled)" if is_torch else "a pickle, which runs code when read"
    if head.startswith(b"\x89HDF"):
        return "HDF5 (Keras)"
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < len(raw):
        return "safetensors"
    by_ending = {".onnx": "ONNX", ".joblib": "a pickle of joblib, which runs code when read", ".npz": "arrays of NumPy"}
    return by_ending.get(PurePosixPath(name).suffix, "unknown")


def _describe_zip(raw: bytes, name: str) -> str:
    """Torch's formats are zips, told apart by what is in them."""
    members = list(_list_zip(raw))
    names = {member.name for member in members}
    folders = {part for member in members for part in member.parts[:-1]}
    if "constants.pkl" in names and "code" in folders:
        return "TorchScript: it needs no model file"
    if "archive_format" in names or "serialized_exported_program.json" in names:
        compiled = any(member.suffix == ".so" for member in members)
        return f"a program of torch.export{', compiled by AOTInductor' * compiled}"
    if "data.pkl" in names:
        tensors = sum("data" in member.parts[:-1] for member in members)
        return f"{tensors} tensors of torch.save, pickled: the model file or the handler says whose they are"
    return "arrays of NumPy" if name.endswith(".npz") else "a zip"


def _list_zip(raw: bytes) -> Iterator[PurePosixPath]:
    """The names in a zip's directory, as far as it is within DIRECTORY_BYTES of the end. Torch writes zip64 records."""
    at = max(0, len(raw) - DIRECTORY_BYTES)
    for _ in range(MAX_ENTRIES):
        at = raw.find(_ENTRY, at)
        if at < 0 or at + _NAME_AT > len(raw):
            return
        length = int.from_bytes(raw[at + 28 : at + 30], "little")
        yield PurePosixPath(raw[at + _NAME_AT : at + _NAME_AT + length].decode(errors="replace"))
        at += _NAME_AT + length

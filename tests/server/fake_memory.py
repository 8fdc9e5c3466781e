"""The memory of the fake device: it is counted and it ends, and who reads it after its end is found out."""

import ctypes
import weakref
from collections.abc import Iterator

import torch
from torch.utils._pytree import tree_leaves


class GraphTouchesStranger(AssertionError):
    """A replay reads memory that was freed since its capture."""


def list_tensors(*tree: object) -> list[torch.Tensor]:
    """The tensors in there."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def get_address(tensor: torch.Tensor) -> int:
    """Where the tensor's storage begins; 0 for one without bytes."""
    return tensor.untyped_storage().data_ptr()


class Ledger:
    """The storages of one kind of memory, and their bytes. A storage leaves when nothing uses it any more."""

    def __init__(self, name: str, *, powers_of_two: bool = False) -> None:
        self.name, self.used_bytes = name, 0
        self._powers_of_two = powers_of_two
        self._serials: dict[int, int] = {}  # by address: another storage may come to lie at the same one
        self._count = 0

    def __repr__(self) -> str:
        """For example `<Ledger of device memory, 4096 bytes in 2 storages>`."""
        return f"<Ledger of {self.name} memory, {self.used_bytes} bytes in {len(self._serials)} storages>"

    def add(self, tensor: torch.Tensor, total_bytes: int) -> None:
        """Count the tensor's storage. Raises torch.OutOfMemoryError beyond `total_bytes`."""
        storage = tensor.untyped_storage()
        if not storage.nbytes() or storage.data_ptr() in self._serials:
            return
        size = 1 << (storage.nbytes() - 1).bit_length() if self._powers_of_two else storage.nbytes()
        if self.used_bytes + size > total_bytes:
            raise torch.OutOfMemoryError(f"CUDA out of memory: {self.used_bytes} of {total_bytes}, {size} wanted")
        self.used_bytes += size
        self._count += 1
        self._serials[storage.data_ptr()] = self._count
        weakref.finalize(storage, self._remove, storage.data_ptr(), size).atexit = False

    def get_serial(self, tensor: torch.Tensor) -> int | None:
        """What tells this storage from all others; None for one that is not of this memory."""
        return self._serials.get(get_address(tensor))

    def _remove(self, address: int, size: int) -> None:
        self.used_bytes -= size
        del self._serials[address]


class Reference:
    """A tensor's memory as a graph knows it: by its address, which keeps nothing alive."""

    def __init__(self, tensor: torch.Tensor, ledger: Ledger) -> None:
        self._address, self._serial, self._ledger = get_address(tensor), ledger.get_serial(tensor), ledger
        count = tensor.untyped_storage().nbytes() // tensor.itemsize
        if self._serial is None or not count:  # a constant of the host's: the families keep it
            self.tensor = tensor
            return
        memory = (ctypes.c_byte * (count * tensor.itemsize)).from_address(self._address)
        flat = torch.frombuffer(memory, dtype=tensor.dtype, count=count)
        self.tensor = flat.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())

    def __repr__(self) -> str:
        return f"<Reference to {tuple(self.tensor.shape)}>"

    def check(self) -> None:
        """Raises GraphTouchesStranger if the memory was freed, whoever lies there now."""
        if self._serial is not None and self._ledger.get_serial(self.tensor) != self._serial:
            raise GraphTouchesStranger("a graph reads memory that was freed since its capture")


def list_new(result: object, *given: object) -> Iterator[torch.Tensor]:
    """The tensors of a result whose memory none of the given ones had."""
    known = {get_address(tensor) for tensor in list_tensors(*given)}
    return (tensor for tensor in list_tensors(result) if get_address(tensor) not in known)

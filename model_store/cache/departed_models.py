"""What a larger cache would have held: the models that were evicted, and how much was evicted after each. Pure.

A cache with N bytes more still holds what the last N evicted bytes were (Mattson et al. 1970, "Evaluation techniques
for storage hierarchies": exact for LRU). A model that was evicted twice counts twice, so that the bytes that would have
been needed are never said too low. The worker's step thread owns it.
"""

from model_store.name_table import NameTable
from model_store.names import ModelName

MOST_BYTES = 4 * 1024 * 1024  #: of names that are remembered
VALUE_BYTES = 32


class DepartedModels:
    """The models that were evicted last, a bounded number of names."""

    def __init__(self) -> None:
        self._left_at: NameTable[int] = NameTable(MOST_BYTES, VALUE_BYTES)  # by model, the bytes evicted before it
        self._evicted_bytes = 0

    def __repr__(self) -> str:
        """For example `<DepartedModels 12 names, 0.2 MB evicted>`."""
        return f"<DepartedModels {len(self._left_at)} names, {self._evicted_bytes / 1e6:.1f} MB evicted>"

    def note_evicted(self, model: ModelName, size: int) -> None:
        """The model had to leave, with so many bytes."""
        self._left_at.put(model, self._evicted_bytes)
        self._evicted_bytes += size

    def find_shortfall(self, model: ModelName) -> int | None:
        """With how many bytes more the model would still be there; None for one that is not known to have left.

        It is forgotten: it comes back now.
        """
        left_at = self._left_at.pop(model)
        return None if left_at is None else self._evicted_bytes - left_at

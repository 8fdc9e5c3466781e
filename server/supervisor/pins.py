"""The models that operators have pinned. The supervisor remembers them, because workers die."""

from collections.abc import Iterable, Iterator

from model_store.name_table import name_bytes
from server.errors import Situation
from server.ipc.control import ControlError

MAX_PIN_BYTES = 8 * 1024 * 1024  #: of the names of pinned models


class PinnedModels:
    """See the module. It only remembers; who pins or unpins a model at its worker changes it afterwards."""

    def __init__(self, models: Iterable[str]) -> None:
        self._models = set(models)

    def __repr__(self) -> str:
        """For example `<PinnedModels 4>`."""
        return f"<PinnedModels {len(self)}>"

    def __len__(self) -> int:
        return len(self._models)

    def __contains__(self, model: str) -> bool:
        return model in self._models

    def __iter__(self) -> Iterator[str]:
        return iter(self._models)

    def require_room(self, model: str) -> None:
        """Raises ControlError where one more would be too many."""
        if sum(map(name_bytes, self._models)) + name_bytes(model) > MAX_PIN_BYTES:
            raise ControlError(f"{len(self)} models are pinned already; unpin some", Situation.NO_ROOM)

    def add(self, model: str) -> None:
        """From now on the model is pinned wherever its home is."""
        self._models.add(model)

    def discard(self, model: str) -> None:
        """It may be evicted again."""
        self._models.discard(model)

"""The items of a call for many models: one by one, or rows of a table that stay columns. Pure."""

from collections.abc import Sequence
from typing import Any, overload

import msgspec

from model_store.names import ModelName
from server.errors import Refused
from server.ipc.packed import Instance, measure_instance
from server.ipc.together import RowColumns


class Item(msgspec.Struct, frozen=True, gc=False):
    """One forecast of a call: which model to ask, and the instance that it is asked with, as it lies in the call's
    body. `size`: what it counts, where known.
    """

    model: ModelName
    instance: Instance
    size: int = 0


class TableItems(Sequence[Item | Refused]):
    """The rows of a table of which none is refused. An item is made only of a row that is wanted by itself."""

    def __init__(self, models: Sequence[ModelName], rows: RowColumns) -> None:
        self.models, self.rows = models, rows

    def __repr__(self) -> str:
        """For example `<TableItems of <RowColumns of 1000 rows, 2 series>>`."""
        return f"<TableItems of {self.rows!r}>"

    def __len__(self) -> int:
        return len(self.models)

    @overload
    def __getitem__(self, at: int) -> Item: ...

    @overload
    def __getitem__(self, at: slice) -> list[Item | Refused]: ...

    def __getitem__(self, at: int | slice) -> Any:
        if isinstance(at, slice):
            return [self[i] for i in range(*at.indices(len(self.models)))]
        at = range(len(self.models))[at]
        return Item(self.models[at], self.rows.cut(at), self.rows.measure(at))


Items = Sequence[Item | Refused]
Instances = Sequence[Instance] | RowColumns


def list_models(items: Items) -> Sequence[str]:
    """The model of each item; nothing for one that names none."""
    if isinstance(items, TableItems):
        return items.models
    return [item.model if isinstance(item, Item) else "" for item in items]


def list_named(items: Items) -> tuple[Sequence[int], Sequence[ModelName]]:
    """The places of the items that name a model, and the models."""
    if isinstance(items, TableItems):
        return range(len(items)), items.models
    named = [(i, item.model) for i, item in enumerate(items) if isinstance(item, Item)]
    return [i for i, _ in named], [model for _, model in named]


def measure_items(items: Items, places: Sequence[int]) -> list[int]:
    """The bytes that each of these items counts."""
    if isinstance(items, TableItems):
        return items.rows.measure_all(places)
    found = (items[at] for at in places)
    return [each.size or measure_instance(each.instance) for each in found if isinstance(each, Item)]


def select_instances(items: Items, places: Sequence[int]) -> Instances:
    """The instances of these items, of which each names a model; columns where they are rows that stay columns."""
    if isinstance(items, TableItems):
        return select_rows(items.rows, places)
    return [each.instance for each in (items[at] for at in places) if isinstance(each, Item)]


def select_rows(instances: Instances, places: Sequence[int]) -> Instances:
    """Those at these places, which ascend; rows that are columns stay so."""
    if isinstance(instances, RowColumns):
        return instances.select(places)
    return instances if len(places) == len(instances) else [instances[at] for at in places]

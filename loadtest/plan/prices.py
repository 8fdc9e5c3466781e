"""Prices of machines, from a table that the user edits, and the cost of one endpoint per model beside one fleet."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb
from pathlib import Path

import msgspec

from server.contract import CACHE_SHARE, GPU_RESERVE_BYTES

EXAMPLE = Path(__file__).with_name("prices.toml")
GIB = 2**30
DEVICE_RESERVE_GIB = GPU_RESERVE_BYTES / GIB  #: memory of an accelerator that models cannot use
MOST_MACHINES = 200


class Machine(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A kind of machine; see prices.toml."""

    name: str
    vcpu: int
    memory_gib: float
    price_per_hour: float
    accelerator: str = ""
    device_memory_gib: float = 0.0
    speed: float = 1.0

    def __post_init__(self) -> None:
        if self.vcpu < 1 or min(self.memory_gib, self.price_per_hour, self.speed) <= 0:
            raise ValueError(f"the machine {self.name}: vcpu, memory_gib, price_per_hour and speed must be above 0")
        if bool(self.accelerator) != (self.device_memory_gib > DEVICE_RESERVE_GIB):
            raise ValueError(f"the machine {self.name}: accelerator and device_memory_gib (above 2) go together")

    @property
    def device(self) -> str:
        """The device on which its models run, under the name that costs have for it."""
        return "cuda" if self.accelerator else "cpu"

    @property
    def workers(self) -> int:
        """The number of workers that the server starts by default: one on an accelerator, else the cores less one."""
        return 1 if self.accelerator else max(1, self.vcpu - 1)

    @property
    def cache_bytes(self) -> int:
        """The memory for models, of all workers together."""
        if self.accelerator:
            return int((self.device_memory_gib - DEVICE_RESERVE_GIB) * GIB)
        return int(self.memory_gib * GIB * CACHE_SHARE)


class Published(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A published comparison: `instances` of `each` for every model, against as many of `fleet` for all models."""

    said: str
    models: int
    instances: int
    each: Machine
    fleet: Machine


class PriceTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A price table."""

    dated: str
    said: str
    machine: Sequence[Machine]
    published: Published | None = None
    currency: str = "$"
    hours_per_month: float = 720.0
    availability: float = 0.995

    def __post_init__(self) -> None:
        if not self.machine or not 0 < self.availability <= 1 or self.hours_per_month <= 0:
            raise ValueError("a price table has machines, hours_per_month above 0, and an availability of 0 to 1")

    def monthly(self, machine: Machine, count: int) -> float:
        """Return the cost of so many machines in a month."""
        return machine.price_per_hour * count * self.hours_per_month

    def money(self, amount: float) -> str:
        """Format an amount in the currency of the table."""
        return f"{self.currency}{amount:,.0f}"


@dataclass(frozen=True, slots=True)
class Comparison:
    """The monthly costs of one endpoint per model, and of one fleet for all."""

    each: float
    fleet: float
    said: str


def compare_published(prices: PriceTable) -> Comparison | None:
    """Compute the published example from its inputs."""
    found = prices.published
    if found is None:
        return None
    each, fleet = (
        prices.monthly(found.each, found.models * found.instances),
        prices.monthly(found.fleet, found.instances),
    )
    said = (
        f"{found.models:,} models, {found.instances} x {found.each.name} each or {found.instances} x {found.fleet.name}"
    )
    return Comparison(each, fleet, f"{said} for all: {found.said}")


def read_prices(path: Path = EXAMPLE) -> PriceTable:
    """Read a price table. Raises ValueError that names the file and the error in it, OSError."""
    try:
        return msgspec.toml.decode(path.read_bytes(), type=PriceTable)
    except (msgspec.MsgspecError, ValueError) as wrong:
        raise ValueError(
            f"{path} is not a price table: {wrong}; {EXAMPLE.name} beside {__name__} is an example"
        ) from wrong


def count_nodes(needed: int, each: float, wanted: float) -> int:
    """Count the machines, each up for a share `each` of time, so that `needed` are up for a share `wanted` of it.

    Raises ValueError if that takes more than MOST_MACHINES.
    """
    for nodes in range(needed, MOST_MACHINES + 1):
        enough = sum(comb(nodes, up) * each**up * (1 - each) ** (nodes - up) for up in range(needed, nodes + 1))
        if enough >= wanted:
            return nodes
    raise ValueError(f"no {MOST_MACHINES} machines of availability {each:g} make {wanted:g}")

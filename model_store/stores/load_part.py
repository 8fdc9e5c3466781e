"""One part of a load as a record. Pure."""

from dataclasses import dataclass


@dataclass(slots=True)
class LoadPart:
    """One part: `store.get` is a part of the `store` before it. Monotonic seconds; `size` in bytes where it has one."""

    name: str
    began: float
    ended: float = 0.0
    size: int = 0
    error: str = ""

"""A device that is as asynchronous as allowed: each operation runs at the last moment, in any legal order."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from server.worker.engine.device import Event

NAN = float("nan")
CPU = torch.device("cpu")


@dataclass(eq=False)
class Work:
    """One thing a stream was told, and the event after it."""

    device: "FakeDevice"
    stream: str
    act: Callable[[], object]
    after: "Work | None"
    done: bool = False

    def query(self) -> bool:
        """Looking lets time pass, perhaps enough."""
        if not self.done and self.device.random.random() < 0.5:
            self.device.advance()
        return self.done

    def synchronize(self) -> None:
        """Let everything happen that this waits for, and by chance other things too."""
        while not self.done:
            self.device.advance()


class GraphTouchesStranger(AssertionError):
    """A replay used memory that it was not captured with."""


class Spy(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Which memory operators are given, and which they make."""

    def __init__(self, allowed: set[int] | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.allowed = allowed  #: memory that may be given; None: any
        self.given: set[int] = set()
        self.made: set[int] = set()
        self._alive: list[torch.Tensor] = []  # or an address could be made twice

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """One operator."""
        given = {tensor.untyped_storage().data_ptr() for tensor in tensors(args, kwargs or {})} - self.made
        if self.allowed is not None and given - self.allowed:
            raise GraphTouchesStranger(f"{func} is given memory that was not there at the capture")
        self.given |= given
        result = func(*args, **(kwargs or {}))
        found = tensors(result)
        self._alive += found
        self.made |= {tensor.untyped_storage().data_ptr() for tensor in found} - self.given
        return result


def tensors(*tree: object) -> list[torch.Tensor]:
    """The tensors in there."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


@dataclass(eq=False)
class FakeDevice:
    """See the module. Fresh memory is NaN. `short_of_memory`: so many of the next allocating calls fail."""

    seed: int = 0
    short_of_memory: int = 0
    where: torch.device = CPU
    total_bytes: int = 2**30
    replays: int = 0
    trims: int = 0
    captures: int = 0
    told: dict[str, list[Work]] = field(default_factory=lambda: {"loads": [], "compute": []})
    uncapturable: bool = False

    def __post_init__(self) -> None:
        """Time passes as the seed says."""
        self.random = random.Random(self.seed)

    # --- Device --------------------------------------------------------------------------------------------------

    def memory(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Device memory, poisoned."""
        self._allocate()
        return self.host(*shape, dtype=dtype)

    def host(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Host memory, poisoned."""
        return torch.full(shape, NAN if dtype.is_floating_point else -(10**15), dtype=dtype)

    def copy(self, target: torch.Tensor, source: torch.Tensor, after: Event | None = None) -> Work:
        """Reads `source` when it happens, not when it is told."""
        self._allocate()
        return self._tell("loads", lambda: target.copy_(source), after)

    def launch(self, work: Callable[[], object], after: Event | None = None) -> Work:
        """All of `work` happens later."""
        self._allocate()
        return self._tell("compute", work, after)

    def graph(self, work: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        """A capture computes nothing; a replay must touch what the capture touched, and nothing else."""
        self._allocate()
        if self.uncapturable:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.captures += 1
        with torch.inference_mode(), Spy() as spy:
            answer = work()
            answer.fill_(NAN)
        allowed = spy.given - spy.made

        def replay() -> torch.Tensor:
            self.replays += 1
            with Spy(allowed):
                result = work()
            return answer.copy_(result)

        return replay

    def drain(self) -> None:
        """Everything told has happened."""
        while any(self.told.values()):
            self.advance()

    def trim(self) -> None:
        """Counted."""
        self.trims += 1

    def free_and_total(self) -> tuple[int, int]:
        """As set."""
        return self.total_bytes, self.total_bytes

    # --- time -------------------------------------------------------------------------------------------------------

    def advance(self) -> None:
        """One of the things that may happen next happens."""
        ready = [queue for queue in self.told.values() if queue and (queue[0].after is None or queue[0].after.done)]
        assert ready, "the streams wait for each other"
        work = self.random.choice(ready).pop(0)
        with torch.inference_mode():
            work.act()
        work.done = True

    def _tell(self, stream: str, act: Callable[[], object], after: Event | None) -> Work:
        assert after is None or isinstance(after, Work)
        work = Work(self, stream, act, after)
        self.told[stream].append(work)
        return work

    def _allocate(self) -> None:
        if self.short_of_memory:
            self.short_of_memory -= 1
            raise torch.OutOfMemoryError("out of memory, as ordered")

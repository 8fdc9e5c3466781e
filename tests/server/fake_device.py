"""A device that is as asynchronous as allowed: each operation runs at the last moment, in any legal order.

It is strict, too. Its memory is counted and ends, also inside of work. A failed capture is never over by itself. An
error of its context stays. Graphs repeat operators on the memory of their capture. Sums come in any order.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch.utils._python_dispatch import _disable_current_modes

from server.worker.engine.capture import capture_graph
from server.worker.engine.device import Event
from tests.server.fake_memory import Ledger
from tests.server.fake_operators import INVALIDATED, Operators, Recording, poison

CPU = torch.device("cpu")
STILL_CAPTURING = "captures_underway.empty() INTERNAL ASSERT FAILED"


@dataclass(eq=False)
class Work:
    """One thing a stream was told, and the event after it."""

    device: "FakeDevice"
    stream: str
    act: Callable[[], object]
    after: "Work | None"
    done: bool = False
    error: Exception | None = None

    def query(self) -> bool:
        """Looking lets time pass, perhaps enough."""
        self.device.require_context()
        if not self.done and self.device.random.random() < 0.5:
            self.device.advance()
        return self.done

    def synchronize(self) -> None:
        """Let everything happen that this waits for, and by chance other things too."""
        self.device.require_context()
        while not self.done:
            self.device.advance()
        self.device.require_context()
        error, self.error = self.error, None
        try:
            if error is not None:
                raise error
        finally:
            del error  # its traceback holds this frame, and with it whatever the work used


class FakeCapture:
    """As PyTorch has it: the end of a capture that failed raises before the allocator is told."""

    def __init__(self, device: "FakeDevice", recording: Recording) -> None:
        self._device, self._recording = device, recording
        self._mode = Operators(device, recording)
        self._is_recording = False

    def begin(self) -> None:
        """The cache is emptied at first."""
        self._device.empty_cache()
        self._device.captures += 1
        self._device.is_capturing = self._is_recording = True
        self._recording.invalid = self._device.uncapturable
        self._mode.__enter__()  # type: ignore[no-untyped-call]

    def end(self) -> None:
        """Of the stream, then of the allocator."""
        if not self._is_recording:
            raise torch.AcceleratorError("CUDA error: illegal state")
        self._is_recording = False
        self._mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        if self._recording.invalid:
            raise torch.AcceleratorError(INVALIDATED)
        self._device.is_capturing = False

    def abandon(self) -> None:
        """Of the allocator."""
        if not self._device.endless_captures:
            self._device.is_capturing = False
        self._device.empty_cache()


@dataclass(eq=False)
class FakeDevice:
    """See the module. Fresh memory is NaN. `short_of_memory`: so many of the next allocating calls fail."""

    seed: int = 0
    short_of_memory: int = 0
    where: torch.device = CPU
    total_bytes: int = 2**30
    page_locked_bytes: int = 2**30  #: that the host lets the device have
    replays: int = 0
    trims: int = 0
    captures: int = 0
    told: dict[str, list[Work]] = field(default_factory=lambda: {"loads": [], "compute": []})
    uncapturable: bool = False
    endless_captures: bool = False  #: nothing ends a capture that failed
    broken: bool = False  #: its context, for good
    is_capturing: bool = False  #: the allocator's view: for ever after a failed capture that nobody ended

    def __post_init__(self) -> None:
        """Time passes as the seed says."""
        self.random = random.Random(self.seed)
        self.disorder = torch.Generator().manual_seed(self.seed)
        self.ledger = Ledger("device")
        self.page_locked = Ledger("page-locked", powers_of_two=True)

    # --- Device --------------------------------------------------------------------------------------------------

    def memory(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Device memory, poisoned."""
        self._allocate()
        made = torch.empty(shape, dtype=dtype)
        self.count(made)
        return poison(made)

    def host(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Page-locked host memory, poisoned; it ends too, and is counted in powers of two."""
        self.require_context()
        made = torch.empty(shape, dtype=dtype)
        self.page_locked.add(made, self.page_locked_bytes)
        return poison(made)

    def copy(self, target: torch.Tensor, source: torch.Tensor, after: Event | None = None) -> Work:
        """Reads `source` when it happens, not when it is told."""
        self._allocate()
        return self._tell("loads", lambda: target.copy_(source), after)

    def launch(self, work: Callable[[], object], after: Event | None = None) -> Work:
        """All of `work` happens later."""
        self._allocate()
        return self._tell("compute", work, after)

    def graph(self, work: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        """A capture computes nothing; a replay repeats its operators."""
        self._allocate()
        recording = Recording(self)
        with torch.inference_mode():
            answer = poison(capture_graph(FakeCapture(self, recording), work))

        def replay() -> torch.Tensor:
            self.replays += 1
            with _disable_current_modes():
                recording.replay()
            return answer

        return replay

    def drain(self) -> None:
        """Everything told has happened."""
        self.require_context()
        while any(self.told.values()):
            self.advance()
        self.require_context()

    def trim(self) -> None:
        """Counted."""
        self.empty_cache()
        self.trims += 1

    def free_and_total(self) -> tuple[int, int]:
        """As counted."""
        self.require_context()
        return self.total_bytes - self.ledger.used_bytes, self.total_bytes

    # --- errors -----------------------------------------------------------------------------------------------------

    def break_context(self) -> None:
        """An illegal access, now or in work: from then on every call fails."""
        self.broken = True

    def require_context(self) -> None:
        """Raises torch.AcceleratorError once the context is broken."""
        if self.broken:
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    def empty_cache(self) -> None:
        """Raises RuntimeError during a capture."""
        self.require_context()
        if self.is_capturing:
            raise RuntimeError(STILL_CAPTURING)

    def count(self, made: torch.Tensor) -> None:
        """Raises torch.OutOfMemoryError for memory that the device has not."""
        self.ledger.add(made, self.total_bytes)

    # --- time -------------------------------------------------------------------------------------------------------

    def advance(self) -> None:
        """One of the things that may happen next happens. Its error is told to those who wait for it."""
        ready = [queue for queue in self.told.values() if queue and (queue[0].after is None or queue[0].after.done)]
        assert ready, "the streams wait for each other"
        work = self.random.choice(ready).pop(0)
        work.done = True
        try:
            with torch.inference_mode(), Operators(self):
                work.act()
        except AssertionError:
            raise
        except Exception as error:
            work.error = error

    def _tell(self, stream: str, act: Callable[[], object], after: Event | None) -> Work:
        assert after is None or isinstance(after, Work)
        work = Work(self, stream, act, after)
        self.told[stream].append(work)
        return work

    def _allocate(self) -> None:
        self.require_context()
        if self.short_of_memory:
            self.short_of_memory -= 1
            raise torch.OutOfMemoryError("out of memory, as ordered")

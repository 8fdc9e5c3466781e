"""Whether the store answers. Loader threads and the probe note it; whoever decides about loads reads it."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from model_store.names import ModelName

#: Seconds after which a probe without an answer says that the store is out, long before it times out.
PROBE_PATIENCE_S = 1.0
#: What a probe asks for. No store has it: "not found" is a short answer that costs nothing.
PROBE = ModelName("fleetcast-probe")


class StoreHealth:
    """What the requests of this process have heard of the store. `now` is the monotonic clock.

    Thread-safe: each field is replaced as a whole, and a late note is put right by the next one.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._answered_at = -math.inf
        self._failing_since: float | None = None
        self._probing_since: float | None = None
        self.heard_at = now()  #: when a request last had an answer, or was given up

    def __repr__(self) -> str:
        """For example `<StoreHealth failing for 3.2 s>`."""
        return f"<StoreHealth {f'failing for {self.failing_s():.1f} s' if self.is_out else 'answering'}>"

    @property
    def is_out(self) -> bool:
        """Whether the store has stopped to answer: nothing was answered since a request failed, or a probe hangs."""
        return self._out_since() is not None

    def failing_s(self) -> float:
        """For how many seconds the store has not answered; 0 while it does."""
        since = self._out_since()
        return 0.0 if since is None else max(0.0, self._now() - since)

    def note_answer(self) -> None:
        """The store has answered, be it that there is no such key."""
        self._answered_at = self.heard_at = self._now()
        self._failing_since = None

    def note_failure(self, asked_at: float) -> None:
        """A request of `asked_at` was not answered. Where others have been since, it is the key and not the store."""
        self.heard_at = self._now()
        if self._failing_since is None and self._answered_at <= asked_at:
            self._failing_since = asked_at

    @contextmanager
    def probing(self) -> Iterator[None]:
        """A probe waits for its answer inside."""
        self._probing_since = self._now()
        try:
            yield
        finally:
            self._probing_since = None

    def _out_since(self) -> float | None:
        failing, probing = self._failing_since, self._probing_since
        if failing is not None:
            return failing
        if probing is not None and self._now() - probing >= PROBE_PATIENCE_S and self._answered_at < probing:
            return probing
        return None

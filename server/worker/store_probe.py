"""Asks the store at the start and now and then whether it answers, so that no request has to find out.

The step thread owns it.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from model_store.stores.store_health import StoreHealth

#: Seconds between two probes while the store is out, or a request to it is slow.
AGAIN_S = 1.0
#: Seconds without a word from the store after which it is asked, though no load asks.
IDLE_S = 30.0


class StoreProbe:
    """The probes of one worker, one at a time, on a thread of its own. `ask`: see `ModelStore.probe`."""

    def __init__(self, ask: Callable[[], None], health: StoreHealth) -> None:
        self._ask, self._health = ask, health
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="probe")
        self._asking: Future[None] | None = None
        self._asked_at = 0.0

    def __repr__(self) -> str:
        """For example `<StoreProbe of <StoreHealth answering>>`."""
        return f"<StoreProbe of {self._health!r}>"

    def advance_time(self, now: float, *, doubted: bool) -> None:
        """Begin a probe if it is time; `doubted`: a request to the store is slow. `now` as `StoreHealth.heard_at`."""
        if self._asking is not None and not self._asking.done():
            return
        due = self._asked_at + AGAIN_S if doubted or self._health.is_out else self._health.heard_at + IDLE_S
        if self._asking is None or now >= due:  # at the start a wrong address must not wait for the first request
            self._asked_at = now
            self._asking = self._thread.submit(self._ask)

    def close(self) -> None:
        """Begin no more probes."""
        self._thread.shutdown(wait=False, cancel_futures=True)

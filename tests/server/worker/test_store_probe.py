"""When the store is probed, with a clock of the test's own."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from model_store.stores.store_health import PROBE_PATIENCE_S, StoreHealth
from server.worker.store_probe import AGAIN_S, IDLE_S, StoreProbe
from tests.patience import PATIENCE_S, wait_until


class Probed:
    """A store that answers probes at once, unless it is held."""

    def __init__(self) -> None:
        self.now = 1_000.0
        self.health = StoreHealth(lambda: self.now)
        self.answering = threading.Event()
        self.answering.set()
        self.asked = 0

    def ask(self) -> None:
        """As `ModelStore.probe`."""
        with self.health.probing():
            self.asked += 1
            assert self.answering.wait(PATIENCE_S), "the test forgot to answer"
            self.health.note_answer()


@contextmanager
def run_probe() -> Iterator[tuple[Probed, StoreProbe]]:
    """A probe that ends with the test."""
    store = Probed()
    probe = StoreProbe(store.ask, store.health)
    try:
        yield store, probe
    finally:
        store.answering.set()
        probe.close()


def test_a_store_that_nobody_asks_is_probed() -> None:
    """At the start, so that a wrong address is known before a load asks, and after a while without a word from it; a
    store that has answered lately is left alone.
    """
    with run_probe() as (store, probe):
        probe.advance_time(store.now, doubted=False)
        wait_until(lambda: store.asked == 1 and store.health.heard_at == store.now, "it is asked at the start")
        store.now += IDLE_S / 2
        probe.advance_time(store.now, doubted=False)
        assert store.asked == 1
        store.now += IDLE_S / 2
        probe.advance_time(store.now, doubted=False)
        wait_until(lambda: store.asked == 2 and store.health.heard_at == store.now, "it is asked after a while")
        store.now += IDLE_S / 2
        probe.advance_time(store.now, doubted=False)
        assert store.asked == 2


def test_a_slow_request_is_reason_to_ask_and_a_hanging_probe_says_that_the_store_is_out() -> None:
    """One probe at a time. Where it is answered, only a key hangs."""
    with run_probe() as (store, probe):
        store.answering.clear()
        probe.advance_time(store.now, doubted=True)
        wait_until(lambda: store.asked == 1, "it is asked")
        assert not store.health.is_out
        store.now += PROBE_PATIENCE_S
        assert store.health.failing_s() == PROBE_PATIENCE_S
        store.now += 10 * AGAIN_S
        probe.advance_time(store.now, doubted=True)
        store.answering.set()
        wait_until(lambda: not store.health.is_out, "it has answered")
        assert store.asked == 1


def test_while_the_store_is_out_it_is_probed_again_and_again() -> None:
    """Every AGAIN_S, until one is answered."""
    with run_probe() as (store, probe):
        store.health.note_failure(store.now)
        assert store.health.is_out
        probe.advance_time(store.now, doubted=False)
        wait_until(lambda: not store.health.is_out, "it has answered")
        store.health.note_failure(store.now + 1)
        probe.advance_time(store.now + AGAIN_S / 2, doubted=False)
        assert store.asked == 1


def test_a_key_that_hangs_is_no_outage() -> None:
    """Others were answered since it was asked for; what fails without such an answer is an outage."""
    now = [100.0]
    health = StoreHealth(lambda: now[0])
    health.note_answer()
    health.note_failure(90.0)
    assert not health.is_out
    now[0] = 120.0
    health.note_failure(110.0)
    health.note_failure(115.0)
    assert health.failing_s() == 10.0
    health.note_answer()
    assert health.failing_s() == 0.0

"""Hours of churn in compressed time: two families of different row sizes trade one pool back and forth.

The real `Cache` decides, by LRU, and the real `Pool` holds the bytes, as in a worker; only the clock is made up.
Whatever fragments would show as a drift: room that nobody can use, fewer models in as much memory, more moves a load.
"""

import statistics
from dataclasses import dataclass, field
from zlib import crc32

import numpy as np
import pytest
import torch

from handlers.base import Float32
from model_store.cache.cache import Cache, Placed
from model_store.cache.slots import Slot
from model_store.cache.victim_selection import Evict, Moves
from model_store.names import ModelName
from server.worker.engine.memory_pool import Pool

pytestmark = pytest.mark.slow

SLAB = 64 * 1024
SLABS = 24
ROWS = {"wide": 20_480, "narrow": 4_544}  #: bytes: 3 and 14 to a slab, both leave a rest
MODELS = {"wide": 120, "narrow": 500}  #: more of each than fit
TURNS, REQUESTS = 100, 1200  #: a turn is one family's
S_A_REQUEST = 0.4
BEST = 3  #: models of the family that is not hot which are asked still: one slab's


@dataclass
class Span:
    """A turn's requests: loads and moves, and what the cache held when it ended."""

    loads: int = 0
    moves: int = 0
    used: int = 0
    models: dict[str, int] = field(default_factory=dict)


class Churn:
    """A worker's step loop without requests' contents: leases, loads, evictions and moves at once."""

    def __init__(self) -> None:
        self.cache = Cache(SLABS * SLAB, SLAB)
        self.pool = Pool(SLABS * SLAB, torch.device("cpu"))
        self.pool.floats.fill_(float("nan"))
        self.now = 0.0
        self._sums: dict[str, int] = {}
        self._rng = np.random.default_rng(11)

    def turn(self, hot: str) -> Span:
        """Requests of which nine in ten are for the hot family, its models alike; one in ten for the other's BEST."""
        span = Span()
        for _ in range(REQUESTS):
            self.now += S_A_REQUEST
            if self._rng.random() < 0.9:
                self._request(hot, int(self._rng.integers(MODELS[hot])), span)
            else:
                other = "narrow" if hot == "wide" else "wide"
                self._request(other, int(self._rng.integers(BEST)), span)
        span.used = self.cache.used_bytes
        slots = list(self.cache)
        span.models = {family: sum(slot.family == family for slot in slots) for family in ROWS}
        return span

    def check(self) -> None:
        """Every resident row holds the bytes that were written, wherever it lies now, and none overlaps another."""
        end = 0
        for slot in sorted(self.cache, key=lambda slot: slot.offset):
            assert slot.offset >= end, f"{slot!r} overlaps the row before it"
            end = slot.offset + slot.charge
            assert self._sum(slot) == self._sums[slot.model], f"{slot!r} has other bytes than were written"

    def _request(self, family: str, index: int, span: Span) -> None:
        name = ModelName(f"{family}/{index}")
        slot = self.cache.lease(name, self.now)
        if slot is None:
            span.loads += 1
            self._load(name, family, span)
            slot = self.cache.lease(name, self.now)
        assert slot is not None, f"{name} was loaded just now"
        self.cache.release(slot)

    def _load(self, name: ModelName, family: str, span: Span) -> None:
        self.cache.want(name, self.now)
        while not isinstance(answer := self.cache.place(name, "1", ROWS[family], self.now, family), Placed):
            if isinstance(answer, Moves):
                for slot, offset in answer.moves:
                    self.pool.move(slot.offset, offset, slot.charge)
                    self.cache.moved(slot, offset)
                span.moves += len(answer.moves)
            else:
                assert isinstance(answer, Evict), f"nobody holds a lease, but {name} gets {answer}"
                assert all(self.cache.retired(victim) for victim in answer.victims)
        row = self._rng.standard_normal(ROWS[family] // 4, dtype=np.float32)
        self.pool.write(answer.slot.offset, row)
        self._sums[name] = crc32(row.tobytes())
        self.cache.ready(answer.slot, self.now)

    def _sum(self, slot: Slot) -> int:
        row: Float32 = self.pool.read(slot.offset, slot.charge)
        return crc32(row.tobytes())


@pytest.fixture(scope="module")
def spans() -> list[Span]:
    """The whole churn: families hot in turns, every row's bytes checked after each."""
    churn, found = Churn(), list[Span]()
    for turn in range(TURNS):
        found.append(churn.turn("wide" if turn % 2 else "narrow"))
        churn.check()
    return found


def test_it_is_a_churn(spans: list[Span]) -> None:
    """Half a day and tens of thousands of loads, in which most of the pool changes hands every turn, with moves."""
    assert TURNS * REQUESTS * S_A_REQUEST > 12 * 3600
    assert sum(span.loads for span in spans) > 40_000
    assert sum(span.moves for span in spans) > 10_000
    for narrow, wide in zip(spans[2::2], spans[3::2], strict=True):
        assert narrow.models["narrow"] > 3 * wide.models["narrow"]
        assert wide.models["wide"] > 3 * narrow.models["wide"]


@pytest.mark.parametrize("family", ["wide", "narrow"])
def test_nothing_drifts(spans: list[Span], family: str) -> None:
    """From the first tenth to the last, in this family's turns: as many bytes used, as many models, moves and loads.

    The first turns fill an empty pool and do not count.
    """
    mine = spans[3::2] if family == "wide" else spans[2::2]
    tenth = len(mine) // 10
    early, late = mine[:tenth], mine[-tenth:]
    assert {span.used for span in mine} == {SLABS * SLAB}
    for what, share in (("models", 0.02), ("loads", 0.05), ("moves", 0.25)):
        before, after = (statistics.mean(_number_model(span, what, family) for span in part) for part in (early, late))
        assert after == pytest.approx(before, rel=share, abs=1), what


def test_memory_is_full_of_models(spans: list[Span]) -> None:
    """Slabs are held for rows that are there: what stands empty is less than a slab a family and the rest of each."""
    for span in spans[2:]:
        per_slab = {family: SLAB // size for family, size in ROWS.items()}
        least = sum(-(-count // per_slab[family]) for family, count in span.models.items())
        assert SLABS - least <= 2


def _number_model(span: Span, what: str, family: str) -> int:
    return span.models[family] if what == "models" else int(getattr(span, what))

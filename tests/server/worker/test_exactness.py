"""One forward for many models is exact: whatever way a batch takes, each answer is the single model's own.

abs <= 1e-5 + 1e-4 |reference|, in a pool whose free memory is NaN, so that nothing can leak in from a neighbour.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from handlers.base import Family, Float32
from handlers.forecasters import ARCHITECTURES, build_family, random_tensors
from server.worker.engine.cpu import Engine
from server.worker.engine.execution_plan import CELLS, CostTable, Path
from server.worker.engine.memory_pool import Pool

CPU = torch.device("cpu")
#: Small sizes for whatever an architecture's config has.
SMALL = {"features": 3, "context_length": 12, "prediction_length": 4, "quantiles": 3, "channels": 8, "hidden": 9}
#: Tables under which a batch takes one way wherever it can, and the one of a family that was never measured.
TABLES = {
    path: CostTable({(other, size): size * (1e-6 if other is path else 1.0) for other, size in CELLS}) for path in Path
} | {None: CostTable()}


def make_small(architecture: str) -> Family:
    """A family of the architecture that is quick to run."""
    fields = ARCHITECTURES[architecture].config.__struct_fields__
    return build_family(architecture, {name: size for name, size in SMALL.items() if name in fields})


class SeededModels:
    """Models of a family by their seed, each with the inputs it is asked and what it answers to them alone."""

    INPUTS = 3

    def __init__(self, family: Family) -> None:
        self.family = family
        shape = (self.INPUTS, *family.input_shape)
        self.x: Float32 = np.random.default_rng(0).standard_normal(shape, np.float32)
        self._answers: dict[int, Float32] = {}

    def row(self, seed: int) -> Float32:
        """The model's flat row."""
        return self.family.row(random_tensors(self.family, seed))

    def answer(self, seed: int, which: int) -> Float32:
        """What the plain network answers to input `which`."""
        if seed not in self._answers:
            network = self.family.reference()
            tensors = random_tensors(self.family, seed)
            network.load_state_dict({name: torch.from_numpy(value) for name, value in tensors.items()})
            with torch.inference_mode():
                self._answers[seed] = network(torch.from_numpy(self.x)).numpy()
        found: Float32 = self._answers[seed][which]
        return found


def ask(engine: Engine, models: SeededModels, asked: list[tuple[int, int, int]]) -> None:
    """One batch of (offset, seed, input); every answer must be its model's."""
    parts = [models.x[which : which + 1] for _, _, which in asked]
    answers = engine.run(models.family, [offset for offset, _, _ in asked], parts)
    for (_, seed, which), answer in zip(asked, answers, strict=True):
        np.testing.assert_allclose(answer[0], models.answer(seed, which), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("path", TABLES)
@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_every_architecture_on_every_path(architecture: str, path: Path | None) -> None:
    """Batches of 1 to 512 rows of twelve models: side by side, apart, in any order, and one model's alone."""
    models = SeededModels(make_small(architecture))
    size = models.family.row_floats * 4
    engine = Engine(Pool(16 * size, CPU), 512)
    engine.pool.floats.fill_(float("nan"))
    places = [i * size for i in (*range(8), 9, 11, 13, 15)]
    for seed, offset in enumerate(places):
        engine.pool.write(offset, models.row(seed))
    engine.use_costs(models.family, TABLES[path])
    numbers = np.random.default_rng(1)
    for count in (1, 2, 8, 63, 64, 65, 200, 512):
        for seeds in (np.arange(count) % 12, numbers.integers(0, 12, count), np.full(count, 5)):
            ask(engine, models, [(places[seed], int(seed), int(numbers.integers(0, 3))) for seed in seeds])


@dataclass(frozen=True)
class Place:
    """A row's place in the pool: the family's index and the offset in bytes."""

    family: int
    offset: int


class ExactnessMachine(RuleBasedStateMachine):
    """Rows of two families are loaded, evicted and moved between steps of any mix, on any path, measured meanwhile."""

    ROWS = 10

    @initialize(pair=st.permutations(sorted(ARCHITECTURES)))
    def start(self, pair: list[str]) -> None:
        """A pool of poison, half of its rows loaded."""
        self.models = [_make_cached(name) for name in pair[:2]]
        sizes = [models.family.row_floats * 4 for models in self.models]
        self.engine = Engine(Pool(self.ROWS * sum(sizes), CPU), 512)
        self.engine.pool.floats.fill_(float("nan"))
        self.free = [Place(0, i * sizes[0]) for i in range(self.ROWS)]
        self.free += [Place(1, self.ROWS * sizes[0] + i * sizes[1]) for i in range(self.ROWS)]
        self.rows: dict[Place, int] = {}
        for seed, place in enumerate(self.free[::2]):
            self._load(place, seed)

    @precondition(lambda self: self.free)
    @rule(data=st.data(), seed=st.integers(0, 20))
    def load(self, data: st.DataObject, seed: int) -> None:
        """A model comes to any free row."""
        self._load(data.draw(st.sampled_from(self.free)), seed)

    @precondition(lambda self: len(self.rows) > 1)
    @rule(data=st.data())
    def evict(self, data: st.DataObject) -> None:
        """A model goes; what it leaves is poison."""
        self._leave(data.draw(st.sampled_from(sorted(self.rows, key=_find_offset))))

    @rule(data=st.data())
    def move(self, data: st.DataObject) -> None:
        """A model's row moves to a free one of its family."""
        source = data.draw(st.sampled_from(sorted(self.rows, key=_find_offset)))
        targets = [place for place in self.free if place.family == source.family]
        if targets:
            target = data.draw(st.sampled_from(targets))
            self.engine.pool.move(source.offset, target.offset, self._size(source))
            self.free.remove(target)
            self.rows[target] = self.rows[source]
            self._leave(source)

    @rule(data=st.data(), path=st.sampled_from([*TABLES]))
    def step(self, data: st.DataObject, path: Path | None) -> None:
        """A batch of one family."""
        of = data.draw(st.sampled_from(sorted(self.rows, key=_find_offset))).family
        here = sorted((place for place in self.rows if place.family == of), key=_find_offset)
        asked = data.draw(st.lists(st.tuples(st.sampled_from(here), st.integers(0, 2)), min_size=1, max_size=90))
        self.engine.use_costs(self.models[of].family, TABLES[path])
        ask(self.engine, self.models[of], [(place.offset, self.rows[place], which) for place, which in asked])

    @rule()
    def learn(self) -> None:
        """Paths are timed in between, also on rows that are gone."""
        self.engine.learn()

    @rule()
    def trim(self) -> None:
        """Staging and bindings are given back."""
        self.engine.trim()

    def _size(self, place: Place) -> int:
        return self.models[place.family].family.row_floats * 4

    def _load(self, place: Place, seed: int) -> None:
        self.engine.pool.write(place.offset, self.models[place.family].row(seed))
        self.free.remove(place)
        self.rows[place] = seed

    def _leave(self, place: Place) -> None:
        floats = self.engine.pool.floats[place.offset // 4 : (place.offset + self._size(place)) // 4]
        floats.fill_(float("nan"))
        del self.rows[place]
        self.free.append(place)


@cache  # what the plain networks answer is the same in every example
def _make_cached(architecture: str) -> SeededModels:
    return SeededModels(make_small(architecture))


def _find_offset(place: Place) -> int:
    return place.offset


TestWorker = ExactnessMachine.TestCase
TestWorker.settings = settings(
    deadline=None, max_examples=40, stateful_step_count=30, suppress_health_check=[HealthCheck.too_slow]
)

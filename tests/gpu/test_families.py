"""Every architecture, ensembles and graphs on a device: batches against one by one there, and against the CPU.

A batch runs other kernels on CUDA than a row alone (batched products, `vmap`), and other ones than on the CPU. So a
difference between the first two is a fault of ours, one between device and CPU may be a library's.
"""

from collections.abc import Callable
from inspect import signature

import numpy as np
import pytest
import torch
from _pytest.mark import ParameterSet
from torch import nn

from handlers.base import Family, Float32
from handlers.forecasters import ARCHITECTURES, build_family, random_tensors
from handlers.kinds.graph.export import export_graph
from handlers.kinds.graph.family import graph_family
from server.worker.engine.accelerator import DeviceEngine, DevicePool
from server.worker.engine.graph_choice import EAGER_RUNS
from tests.gpu.devices import DEVICES, open_device
from tests.handlers.nets import BATCHED, SHAPE, RecurrentNet, make_module
from tests.server.worker.engine.learning import learn_all
from tests.server.worker.test_exactness import SMALL, make_small

MODELS = 5
ROWS = (1, 2, 17, 64, 70)  #: of batches: alone, small, a full forward, more than one
PROVING_ROWS = (3,) * (EAGER_RUNS + 2) + (70,)  #: on the simulated device: one graph, and a batch of two forwards
MAX_ROWS = 64
ABSOLUTE, RELATIVE = 1e-5, 1e-4
#: Those that have one recipe for many members: whatever answers quantiles.
MEMBERS = ("gru", "lear", "mqcnn", "tcn")

Tensors = dict[str, Float32]


def make_forecasters(family: Family) -> tuple[Family, list[Tensors]]:
    """The family and the numbers of its models."""
    return family, [random_tensors(family, seed) for seed in range(MODELS)]


def make_ensemble(architecture: str) -> tuple[Family, list[Tensors]]:
    """Three members each."""
    fields = ARCHITECTURES[architecture].config.__struct_fields__
    config = {name: size for name, size in SMALL.items() if name in fields}
    return make_forecasters(build_family(architecture, {**config, "members": 3}))


def make_graphs(build: Callable[[], nn.Module]) -> tuple[Family, list[Tensors]]:
    """One exported graph; its models differ by some percent, so that a variance stays positive."""
    module = make_module(build, 0)
    program, tensors = export_graph(module, {next(iter(signature(module.forward).parameters)): SHAPE})
    family = graph_family(program)
    family.decide(family.row(tensors))
    rng = np.random.default_rng(0)

    def vary(value: Float32) -> Float32:
        return value * rng.uniform(0.9, 1.1, value.shape).astype(np.float32)

    return family, [{name: vary(value) for name, value in tensors.items()} for _ in range(MODELS)]


FLEETS: dict[str, Callable[[], tuple[Family, list[Tensors]]]] = {
    **{name: lambda name=name: make_forecasters(make_small(name)) for name in sorted(ARCHITECTURES)},  # type: ignore[misc]
    **{f"ensemble-{name}": lambda name=name: make_ensemble(name) for name in MEMBERS},  # type: ignore[misc]
    **{f"graph-{name}": lambda net=net: make_graphs(net) for name, net in BATCHED.items()},  # type: ignore[misc]
    "graph-one-by-one": lambda: make_graphs(RecurrentNet),
}

#: Enough to prove the test on the simulated device; other graphs take their seconds to export.
PROVING = (*sorted(ARCHITECTURES), "ensemble-tcn", "graph-dilated", "graph-batch-norm", "graph-one-by-one")


def on_each_device() -> list[ParameterSet]:
    """All fleets on a GPU, some on the simulated one."""
    simulated, cuda = DEVICES
    return [
        *(pytest.param(fleet, *simulated.values, marks=simulated.marks, id=f"{fleet}-simulated") for fleet in PROVING),
        *(pytest.param(fleet, *cuda.values, marks=cuda.marks, id=f"{fleet}-cuda") for fleet in FLEETS),
    ]


def answer_on_cpu(family: Family, tensors: Tensors, x: Float32) -> Float32:
    """What the plain network answers on the CPU."""
    network = family.reference()
    network.load_state_dict({name: torch.from_numpy(value) for name, value in tensors.items()})
    with torch.inference_mode():
        answer: Float32 = network(torch.from_numpy(x)).numpy()
    return answer


@pytest.mark.parametrize(("fleet", "device"), on_each_device())
def test_batches_are_the_rows_alone_and_the_cpus(fleet: str, device: str) -> None:
    """Models in any order, eager and as graphs, in a pool of poison, every row compared."""
    family, numbers = FLEETS[fleet]()
    size = family.row_floats * 4
    pool = DevicePool(2 * MODELS * size, open_device(device))
    pool.device.launch(lambda: pool.floats.fill_(float("nan"))).synchronize()
    engine, rows = DeviceEngine(pool, MAX_ROWS), [family.row(tensors) for tensors in numbers]
    for model, row in enumerate(rows):
        pool.write(2 * model * size, row)
    rng = np.random.default_rng(1)
    x = rng.standard_normal((3, *family.input_shape), np.float32)
    alone = [np.concatenate([engine.probe(family, row, x[i : i + 1]) for i in range(3)]) for row in rows]
    for answer, tensors in zip(alone, numbers, strict=True):
        assert np.isfinite(answer).all()
        np.testing.assert_allclose(answer, answer_on_cpu(family, tensors, x), rtol=RELATIVE, atol=ABSOLUTE)
    for turn, count in enumerate(ROWS * (EAGER_RUNS + 2) if device == "cuda" else PROVING_ROWS):
        if turn >= EAGER_RUNS:
            learn_all(engine)
        models, which = rng.integers(0, MODELS, count), rng.integers(0, 3, count)
        found = engine.run(family, [2 * int(model) * size for model in models], [x[i : i + 1] for i in which])
        right = np.stack([alone[model][i] for model, i in zip(models, which, strict=True)])
        np.testing.assert_allclose(np.concatenate(found), right, rtol=RELATIVE, atol=ABSOLUTE)


def test_every_architecture_is_there() -> None:
    """A new one is tested on the device from its first day."""
    assert set(ARCHITECTURES) <= set(FLEETS)

"""The step's benchmark in small: its peers give the right answers, everything is compared, the tables can be made."""

import json
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch
from rich.console import Console

from handlers.base import Family, Float32
from handlers.forecasters import build_family, random_tensors
from loadtest.benchmarks.step import PEERS, build_table, judge_step
from loadtest.peers.flat_rows import FlatTcn, SplitMlp
from server.worker.engine.bench_step import StepBenchSizes, import_peer, measure_step

SMALL = StepBenchSizes(
    models=12, batches=(1, 8, 32), hot=2, cold=3, large_batches=(1, 4), repeated=4, answers=8, rounds=2
)


@pytest.mark.parametrize(
    ("family", "make"),
    [
        (build_family("tcn", {"features": 3, "context_length": 40, "channels": 5, "layers": 3}), FlatTcn),
        (build_family("tcn", {"features": 2, "context_length": 20, "channels": 4, "kernel": 2}), FlatTcn),
        (build_family("mlp", {"features": 3, "context_length": 12, "hidden": 9}), SplitMlp),
    ],
)
def test_peers_give_the_networks_answers(family: Family, make: type[FlatTcn | SplitMlp]) -> None:
    """Any models in any order, some more than once, batch after batch: abs <= 1e-5 + 1e-4 |reference|."""
    models = [random_tensors(family, seed) for seed in range(4)]
    peer = make(family, models)
    rng = np.random.default_rng(0)
    for which in ([2, 0, 2, 3, 1], [1], [3, 3, 0, 1, 2]):
        x = rng.standard_normal((len(which), *family.input_shape), dtype=np.float32)
        with torch.inference_mode():
            found = peer(torch.tensor(which), torch.from_numpy(x)).numpy()
        expected = np.concatenate(
            [_answer(family, models[model], row[None]) for model, row in zip(which, x, strict=True)]
        )
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_everything_is_compared_and_shown() -> None:
    """Every batch of every section has times, ratios that are theirs, a floor and its rows' ways; a row each is shown.

    (How fast they are is the benchmark's to say: here are a dozen models.)
    """
    found = json.loads(json.dumps(measure_step(import_peer(PEERS[0]), import_peer(PEERS[1]), SMALL)))
    sections = {name: list(rows) for name, rows in found.items()}
    assert sections == {
        "tcn": ["1", "8", "32", "all"],
        "mlp of 2": ["1", "4"],
        "mlp of 3": ["1", "4"],
        "one model": ["tcn", "mlp"],
    }
    for rows in found.values():
        for compared in rows.values():
            us = {name: taken["median"] for name, taken in compared["us"].items()}
            assert 0 < compared["floor_us"] < us["fleetcast"] * 100
            assert set(compared["ratio"]) == set(us) - {"fleetcast"}
            assert sum(compared["paths"].values()) >= 8
            for name, ratio in compared["ratio"].items():
                assert ratio["min"] <= ratio["max"]
                assert ratio["min"] <= compared["us"]["fleetcast"]["max"] / compared["us"][name]["min"]
    console = Console(width=200)
    with console.capture() as shown:
        console.print(build_table(found), judge_step(found))
    text = shown.get()
    assert text.count("<= 1 ") == 2
    assert text.count("<= 0.8 ") == 1
    assert "12 different models in one step" in text


def test_a_peer_with_wrong_answers_is_no_peer() -> None:
    """What answers something else is not compared: the run ends with numpy's account of the difference."""

    def lie(family: Family, models: Sequence[Mapping[str, Float32]]) -> FlatTcn:
        return FlatTcn(family, [*models[1:], models[0]])

    with pytest.raises(AssertionError, match="Mismatched elements"):
        measure_step(lie, SplitMlp, SMALL)


def _answer(family: Family, tensors: Mapping[str, Float32], x: Float32) -> Float32:
    network = family.reference()
    network.load_state_dict({name: torch.from_numpy(value) for name, value in tensors.items()})
    with torch.inference_mode():
        answer: Float32 = network(torch.from_numpy(x)).numpy()
    return answer

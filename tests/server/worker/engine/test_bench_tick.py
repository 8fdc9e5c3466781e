"""The benchmark of a tick's host time, in small."""

import io

import numpy as np
import pytest

from server.worker.engine.bench_tick import SEED, WARM_UP, TickBench
from tests.server.worker.engine.test_cpu import answer_plainly


@pytest.mark.slow
def test_what_is_measured_is_an_answered_tick() -> None:
    """On a device at work the answers are the models'; on one that does nothing they are measured."""
    bench = TickBench(tick=5, cpu_rows=3, repetitions=2)
    assert repr(bench.device) == "<IdleDevice, idle>"
    bench.device.is_idle = False
    for engine, count in ((bench.engine, 5), (bench.on_cpu, 3)):
        for at, answer in enumerate(bench.answer(engine, bench.bodies[:count])):
            x = np.load(io.BytesIO(bench.bodies[at]))[None]
            right = answer_plainly(bench.family, SEED + at, x)[0]
            np.testing.assert_allclose(np.load(io.BytesIO(answer)), right, rtol=1e-4, atol=1e-5)
    bench.device.is_idle = True
    found = bench.measure_round()
    assert sorted(found) == sorted(f"{part}_{kind}" for part in ("tick", "bodies", "cpu") for kind in ("ms", "cpu_ms"))
    assert min(found.values()) > 0


@pytest.mark.slow
def test_rows_are_in_their_place_before_the_clock_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or else the benchmark would measure the copy that a step does not make."""
    bench = TickBench(tick=5, cpu_rows=1, repetitions=1)
    inputs, encoders = bench.decode(bench.engine, bench.bodies)
    assert inputs.is_staged
    assert len(encoders) == 5
    monkeypatch.delattr(type(bench.engine), "open_batch")
    parts, _ = bench.decode(bench.engine, bench.bodies)
    assert [part.shape for part in parts] == [(1, 8, 168)] * 5
    assert WARM_UP

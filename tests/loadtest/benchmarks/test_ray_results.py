"""The goals of `bench ray`: which ratio is judged, of which rounds, and what is shown of those that were lost."""

import io
from typing import Any

from rich.console import Console

from loadtest.benchmarks.ray_results import (
    BARE,
    DIRECT,
    PROXY,
    RAY,
    RAY_BEST,
    build_table,
    judge_goals,
    list_goals,
    summarise_contenders,
)


def make_found(rps: float, cold_ms: float = 100.0, *, bare: bool = False) -> dict[str, Any]:
    """What was measured of one contender in a round."""
    load = {"rps": rps, "p50_ms": 1.0, "p99_ms": 2.0}
    warm: dict[str, Any] = {"warm": {at: dict(load) for at in ("1", "8", "32")}}
    burst = {"all_ms": cold_ms, "p50_ms": cold_ms / 2, "p99_ms": cold_ms}
    return warm if bare else {**warm, "cold": burst, "tick": dict(burst), "mb_per_model": 0.5, "memory_mb": 300.0}


ROUND = {
    DIRECT: make_found(3000, 90),
    PROXY: make_found(200),
    RAY: make_found(250, 1000),
    BARE: make_found(250, bare=True),
    RAY_BEST: make_found(1500, 600),
}


def test_each_goal_is_a_ratio_of_one_round() -> None:
    """The median over the rounds counts; a ratio on the bound holds."""
    judged = judge_goals([ROUND, {**ROUND, RAY: make_found(300, 900)}, {**ROUND, RAY: make_found(500, 500)}], {})
    by_goal = {each["goal"]: each for each in judged}
    fast = by_goal[f"{DIRECT} / {RAY}, requests/s at 32: >= 10"]
    assert (fast["ratio"]["median"], fast["ratio"]["min"], fast["ratio"]["max"], fast["holds"]) == (10, 6, 12, True)
    cold = by_goal[f"{DIRECT} / {RAY}, p99 of 100 cold models at once: <= 0.1"]
    assert (cold["ratio"]["median"], cold["holds"]) == (0.1, True)
    assert not by_goal[f"{DIRECT} / {RAY_BEST}, requests/s at 32: >= 10"]["holds"]
    assert not by_goal[f"{PROXY} / {BARE}, requests/s at 8: >= 1"]["holds"]
    assert all(
        line.endswith(", missed") != each["holds"] for line, each in zip(list_goals(judged), judged, strict=True)
    )


def test_a_contender_that_was_lost_in_a_round_has_the_others() -> None:
    """And one that was never measured has no goals and no row."""
    rounds = [ROUND, {name: found for name, found in ROUND.items() if name != RAY}]
    (fast, *_) = judge_goals(rounds, {})
    assert fast["ratio"]["runs"] == 1
    alone = [{DIRECT: ROUND[DIRECT]}]
    assert judge_goals(alone, {}) == []
    assert judge_goals([{}], {}) == []
    summary = summarise_contenders([*rounds, {}])
    assert summary[RAY]["cold"]["p99_ms"] == {"median": 1000.0, "min": 1000.0, "max": 1000.0, "runs": 1}
    assert summary[BARE].keys() == {"warm"}
    shown = io.StringIO()
    Console(file=shown, width=200).print(build_table(summary))
    assert all(name in shown.getvalue() for name in ROUND)


def test_cold_models_of_a_distant_store_have_a_goal_of_their_own() -> None:
    """It says how far away the store is."""
    spread = {name: {"p99_ms": {"median": ms}} for name, ms in ((DIRECT, 200.0), (RAY, 2500.0))}
    (judged,) = judge_goals([], {"delay_ms": 25.0, **spread})
    assert judged["holds"]
    assert "store 25 ms away" in judged["goal"]
    assert judged["ratio"]["median"] == 0.08

"""The benchmark of code archives: the archives that both servers get, and the table that compares with the goals."""

import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from handlers.kinds.code.entry_point import CodeStyle, EntryPoint, find_entry_point
from loadtest.benchmarks.code import GOALS, LOADS, build_table, pack_handler, write_small_models
from loadtest.peers.comparison_table import OURS
from loadtest.peers.environments import HERE
from model_store.archives.archive import open_archive
from server.worker.sandbox.inside.handler_context import HandlerContext


def test_the_archive_is_one_of_multi_model_server_and_answers_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """About 100 KB, with the peer's own handler, whose answer is the network's."""
    models = write_small_models(tmp_path, 2)
    pack_handler(models.weights / "m1", tmp_path / "m1.mar")
    archive = open_archive((tmp_path / "m1.mar").read_bytes(), "m1.mar")
    assert find_entry_point(archive) == EntryPoint(CodeStyle.MMS, "handler", "handle")
    assert 90_000 < (tmp_path / "m1.mar").stat().st_size < 130_000
    for folder in (HERE, HERE / "mms"):
        monkeypatch.syspath_prepend(str(folder))
    handler = importlib.import_module("handler")
    try:
        context = HandlerContext("m1", str(models.weights / "m1"), {}, 1, {})
        assert handler.handle(None, context) is None
        (answer,) = handler.handle([{"body": {"x": models.x.tolist()}}], context)
        np.testing.assert_allclose(np.ravel(answer["predictions"]), models.answers["m1"], rtol=1e-4, atol=1e-5)
    finally:
        for name in ("handler", "network"):
            sys.modules.pop(name, None)


def test_the_table_says_which_goals_are_missed() -> None:
    """Each goal has a row, and a ratio says beside it what the floor reaches, which may miss it too."""
    results: dict[str, Any] = {
        "load_ms": {OURS: {"median": 61.0}},
        "private_mb": {"median": 16.0},
        "ratios": {load: {"p50": 0.4, "requests_per_s": 3.0} for load in LOADS},
        "floor_ratios": {load: {"p50": 0.6, "requests_per_s": 3.5} for load in LOADS},
        "turns": {"failed": 1},
    }
    table = build_table(results)
    marks = list(table.columns[3].cells)
    assert list(table.columns[0].cells) == list(GOALS)
    assert marks == ["missed", "", "", "", "missed", "missed"]
    floor = list(table.columns[4].cells)
    assert floor == ["", "", "0.6, misses it too", "3.5", "3.5, misses it too", ""]

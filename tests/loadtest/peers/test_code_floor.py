"""The floor of code archives, as the benchmark runs it."""

from pathlib import Path

import numpy as np
import pytest

from loadtest.benchmarks.code import write_small_models
from loadtest.peers.code_floor import start_code_floor


@pytest.mark.slow
def test_each_model_answers_right_from_a_process_of_its_own(tmp_path: Path) -> None:
    """The floor runs what the compared servers run, or its numbers would say nothing about them."""
    models = write_small_models(tmp_path, 2)
    with start_code_floor(models.weights, 2) as floor:
        body = floor.dialect.tensor_body(models.x)
        for name in ("m0", "m1", "m0"):
            np.testing.assert_allclose(floor.ask(name, body), models.answers[name], rtol=1e-4, atol=1e-5)
        assert len(floor.tree.pids()) == 1 + 1 + 2, "what forks, the front, and a process for each model"
    assert not floor.tree.pids()

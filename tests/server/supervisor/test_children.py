"""How soon a child that ended is started again."""

import pytest

from server.supervisor.children import BACK_OFF_S, choose_pause


@pytest.mark.parametrize(
    ("failures", "lived_s", "pause"),
    [
        (0, 100.0, 0.0),
        (1, 0.0, 0.0),
        (2, 0.0, 0.2),
        (3, 0.0, 0.4),
        (3, 0.3, 0.1),
        (4, 5.0, 0.0),
        (99, 0.0, BACK_OFF_S[1]),
    ],
)
def test_a_child_that_has_lived_longer_than_its_pause_does_not_wait(
    failures: int, lived_s: float, pause: float
) -> None:
    """What fails at once is started ever more seldom; what is killed every few seconds answers again at once."""
    assert choose_pause(failures, lived_s) == pytest.approx(pause)

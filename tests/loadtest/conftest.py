"""The servers that these tests start serve from the CPU, also on a host with GPUs."""

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module", autouse=True)  # before a module's own, and not longer
def _on_the_cpu() -> Iterator[None]:
    """The variable of `--device`, which child processes inherit."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLEETCAST_DEVICE", "cpu")
        yield

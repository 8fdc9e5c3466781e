"""The device of a worker. Streams, events and graphs are tested in `test_accelerator` and `tests/gpu`."""

from hypothesis import given
from hypothesis import strategies as st

from server.worker.engine.device import cache_share

GIB = 2**30


def test_workers_of_one_device_get_equal_parts_at_any_time() -> None:
    """The first, the second, and the first again after its death, each as it finds the device."""
    total, reserve = 80 * GIB, 2 * GIB
    first = cache_share((total, total), reserve, 2)
    second = cache_share((total - first, total), reserve, 2)
    assert first == second == 38 * GIB
    assert cache_share((total - second, total), reserve, 2) == first


def test_every_sharer_has_a_reserve() -> None:
    """A context, staging and temporaries are each worker's own: sixteen of them never use more than there is."""
    total, reserve, sharers = 80 * GIB, 2 * GIB, 16
    assert sharers * (cache_share((total, total), reserve, sharers) + reserve) <= total
    assert cache_share((24 * GIB, 24 * GIB), reserve, sharers) == 0  # refused at the start, with the numbers


@given(total=st.integers(0, 80 * GIB), used=st.integers(0, 80 * GIB), reserve=st.integers(0, 80 * GIB))
def test_never_more_than_is_free(total: int, used: int, reserve: int) -> None:
    """Whatever else lies on the device, the reserve stays free; the answer is never negative."""
    free = max(0, total - used)
    share = cache_share((free, total), reserve, 3)
    assert 0 <= share <= max(0, free - reserve)

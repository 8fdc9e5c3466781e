"""How much of a GPU a worker gives to models, on made-up GPUs with 1 to 16 workers."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.settings import Settings
from server.worker.engine.device_budget import CONTEXT_BYTES, FORWARD_BYTES, NoBudget, cache_share, choose_budget

GIB, SLAB = 2**30, 4 * 2**20
RESERVE = 2 * GIB
SHARERS = st.integers(1, 16)


def test_workers_of_one_device_get_equal_parts_at_any_time() -> None:
    """The first, the second, and the first again after its death, while the other uses all that it may."""
    total = 80 * GIB
    first = cache_share((total - CONTEXT_BYTES, total), RESERVE, 2)
    second = cache_share((total - first - 2 * CONTEXT_BYTES, total), RESERVE, 2)
    assert first == second == 40 * GIB - CONTEXT_BYTES - RESERVE
    used = second + RESERVE + CONTEXT_BYTES
    assert cache_share((total - used - CONTEXT_BYTES, total), RESERVE, 2) == first


@given(total=st.integers(0, 200 * GIB), reserve=st.integers(0, 8 * GIB), sharers=SHARERS)
def test_all_sharers_fit_together(total: int, reserve: int, sharers: int) -> None:
    """Contexts, reserves and models of all workers are never more than there is, or there are no models."""
    share = cache_share((total, total), reserve, sharers)
    assert share == 0 or sharers * (CONTEXT_BYTES + reserve + share) <= total


@given(total=st.integers(0, 80 * GIB), used=st.integers(0, 80 * GIB), reserve=st.integers(0, 80 * GIB))
def test_never_more_than_is_free(total: int, used: int, reserve: int) -> None:
    """Whatever else lies on the device, the reserve stays free; the answer is never negative."""
    free = max(0, total - used)
    share = cache_share((free, total), reserve, 3)
    assert 0 <= share <= max(0, free - reserve)


@pytest.mark.parametrize("sharers", range(1, 17))
@pytest.mark.parametrize("total", [16 * GIB, 24 * GIB, 80 * GIB])
def test_any_number_of_workers_starts_or_is_refused_with_the_numbers(total: int, sharers: int) -> None:
    """With the default reserve: `--workers-per-device` 1 to 16 on a small, a medium and a large GPU."""
    free = total - CONTEXT_BYTES
    least = CONTEXT_BYTES + RESERVE + SLAB
    if total // sharers >= least:
        assert choose_budget("cuda:0", 0, SLAB, (free, total), RESERVE, sharers) >= SLAB
    else:
        wanted = (
            rf"cuda:0 has {free} of {total} bytes free; each of its {sharers} worker.*{RESERVE}.*--workers-per-device"
        )
        with pytest.raises(NoBudget, match=wanted):
            choose_budget("cuda:0", 0, SLAB, (free, total), RESERVE, sharers)


def test_what_is_asked_for_is_given_or_refused_with_the_numbers() -> None:
    """An operator's `model_cache_bytes` that leaves no room for contexts and forwards would fail under load."""
    total = 24 * GIB
    room = total // 2 - CONTEXT_BYTES - RESERVE
    assert choose_budget("cuda:0", room, SLAB, (total, total), RESERVE, 2) == room
    with pytest.raises(NoBudget, match=rf"leaves {room} for models, but model_cache_bytes gives {room + 1} to each"):
        choose_budget("cuda:0", room + 1, SLAB, (total, total), RESERVE, 2)


def test_a_restarted_worker_is_not_refused_what_it_had() -> None:
    """Its siblings use what they may; what is asked for is compared with the whole device, not with what is free."""
    total = 24 * GIB
    room = total // 2 - CONTEXT_BYTES - RESERVE
    left = total - (room + RESERVE + CONTEXT_BYTES) - CONTEXT_BYTES
    assert choose_budget("cuda:0", room, SLAB, (left, total), RESERVE, 2) == room


def test_the_default_reserve_has_room_for_every_bounded_part() -> None:
    """Rows, inputs, scratch, temporaries and graphs of forwards, and the results of ONNX sessions."""
    settings = Settings.model_validate({"store": "archives"})
    assert FORWARD_BYTES + int(settings.max_session_bytes) <= int(settings.gpu_reserve_bytes)


def test_the_page_for_operators_shows_the_refusal_as_it_is() -> None:
    """Its words are what an operator finds when he looks for the message."""
    with pytest.raises(NoBudget) as refused:
        choose_budget("cuda:0", 0, SLAB, (23 * GIB, 24 * GIB), RESERVE, 16)
    page = (Path(__file__).parents[4] / "docs/gpu.md").read_text()
    assert str(refused.value) in " ".join(page.split())

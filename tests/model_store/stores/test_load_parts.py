"""The parts of a load: what does the work says them, and who runs the load hears them."""

import pytest

from model_store.stores.load_parts import MOST_PARTS, LoadParts, timing_part


def fail_to_get() -> None:
    """A part that fails with seven bytes."""
    with timing_part("get") as part:
        part.size = 7
        raise ValueError("torn")


def test_parts_are_heard_by_who_listens() -> None:
    """Within each other, in the order of their beginnings; a failure is the error of all that it leaves."""
    heard = LoadParts()
    with heard.listening():
        with timing_part("disk"):
            pass
        with pytest.raises(ValueError, match="torn"), timing_part("store"):
            fail_to_get()
    assert [(part.name, part.size, part.error) for part in heard.parts] == [
        ("disk", 0, ""),
        ("store", 0, "ValueError: torn"),
        ("store.get", 7, "ValueError: torn"),
    ]
    assert all(part.began <= part.ended for part in heard.parts)


def test_where_nobody_listens_nothing_is_noted() -> None:
    """Neither before nor after, nor by another load."""
    heard, other = LoadParts(), LoadParts()
    with other.listening():
        pass
    with heard.listening(), other.listening(), timing_part("disk"):
        pass
    with timing_part("disk") as part:
        part.size = 1
    assert not heard.parts
    assert len(other.parts) == 1


def test_parts_are_bounded() -> None:
    """A load that goes on and on keeps its first ones."""
    heard = LoadParts()
    with heard.listening():
        for _ in range(100):
            with timing_part("store"):
                pass
    assert len(heard.parts) == MOST_PARTS

"""Which users the children of several templates run as."""

import uuid
from contextlib import closing

import pytest

from server.worker.sandbox.inside import child_users
from server.worker.sandbox.inside.child_users import BLOCK, FIRST_USER, ChildUsers


@pytest.fixture(autouse=True)
def _own_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Claims of this test alone: servers of other tests claim users at the same time."""
    monkeypatch.setattr(child_users, "NAME", f"\0fleetcast-test-{uuid.uuid4().hex}-{{}}")


def test_two_templates_never_have_the_same_user() -> None:
    """However many children each has; and one that has ended leaves its users to the next."""
    with closing(ChildUsers()) as second:
        with closing(ChildUsers()) as first:
            taken = [users.take() for _ in range(2 * BLOCK + 1) for users in (first, second)]
            assert len(set(taken)) == len(taken)
            assert min(taken) == FIRST_USER
            assert max(taken) < FIRST_USER + child_users.USERS
        with closing(ChildUsers()) as third:
            assert third.take() in taken


def test_a_user_is_taken_again_only_when_it_was_given_back() -> None:
    """Then after all others of its block: a slow end of its last child has most time."""
    with closing(ChildUsers()) as users:
        first = users.take()
        others = [users.take() for _ in range(BLOCK - 2)]
        users.give_back(first)
        assert [users.take(), users.take()] == [FIRST_USER + BLOCK - 1, first]
        assert users.take() not in [first, *others]
        assert repr(users) == f"<ChildUsers {BLOCK + 1} taken, {BLOCK - 1} free>"


def test_where_all_are_taken_one_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    """A child that shares its user is better than none; one of its own is taken first."""
    monkeypatch.setattr(child_users, "USERS", BLOCK)
    with closing(ChildUsers()) as first, closing(ChildUsers()) as second:
        taken = [first.take() for _ in range(BLOCK)]
        shared = second.take()
        assert shared in taken
        second.give_back(shared)
        assert second.take() == shared
        first.give_back(taken[3])
        assert [first.take(), first.take()] == [taken[3], shared]

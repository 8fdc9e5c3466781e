"""Places on a host: one process each, and a name that stays with the folder."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from server.cluster.slots import OWN_LOCK, NoSlot, claim_slot
from tests.patience import wait_until

HOLD = "import os, sys; os.set_inheritable(int(sys.argv[1]), False); sys.stdin.read()"


def test_a_name_stays_with_the_folder_whoever_comes(tmp_path: Path) -> None:
    """Two replicas have two places and names; the next process in a place has the name of the one before."""
    first, second = claim_slot(tmp_path, 2), claim_slot(tmp_path, 2)
    assert (first.index, second.index) == (0, 1)
    assert first.name != second.name
    first.release()
    again = claim_slot(tmp_path, 2)
    assert (again.index, again.name) == (0, first.name)
    with pytest.raises(NoSlot, match="--replicas-per-host"):
        claim_slot(tmp_path, 2, wait_s=0)
    again.release()
    second.release()


def test_a_place_is_taken_until_the_servers_end(tmp_path: Path) -> None:
    """A server that outlives its replica still has its place: the next one waits for its end."""
    slot = claim_slot(tmp_path, 1)
    child = subprocess.Popen([sys.executable, "-c", HOLD, str(slot.lock)], stdin=subprocess.PIPE, pass_fds=(slot.lock,))
    slot.release()
    with pytest.raises(NoSlot):
        claim_slot(tmp_path, 1, wait_s=0)
    child.communicate()
    next_one = claim_slot(tmp_path, 1)
    assert next_one.name == slot.name
    next_one.release()
    wait_until(lambda: child.poll() is not None, "the child ends")


def test_who_comes_after_a_dead_replica_waits_for_its_server_and_takes_no_free_place(tmp_path: Path) -> None:
    """There are three places, one of which is taken and one free. The name stays with the models on the disk."""
    first, second = claim_slot(tmp_path, 3), claim_slot(tmp_path, 3)
    pipe = {"stdin": subprocess.PIPE, "pass_fds": (second.lock,)}
    child = subprocess.Popen([sys.executable, "-c", HOLD, str(second.lock)], **pipe)  # type: ignore[call-overload]
    second.release()
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(claim_slot, tmp_path, 3)
        wait_until(lambda: _is_claimed(second.folder), "one waits for the place")
        assert not coming.done()
        third = claim_slot(tmp_path, 3)
        child.communicate()
        again = coming.result()
    assert (again.index, again.name) == (second.index, second.name)
    assert third.name not in (first.name, second.name)
    for slot in (first, again, third):
        slot.release()


def _is_claimed(place: Path) -> bool:
    """Whether a replica has it, or waits for the server there to end. To try the lock could keep that replica out."""
    inode = (place / OWN_LOCK).stat().st_ino
    return any(f":{inode} " in line for line in Path("/proc/locks").read_text().splitlines())

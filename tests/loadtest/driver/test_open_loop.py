"""The driver against a small real HTTP server that can be slow, silent or wrong."""

import resource
import ssl
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import overload

import numpy as np
import pytest
import trustme

from loadtest.driver.dialects import DIALECTS
from loadtest.driver.open_loop import LoadTarget, RemoteNotAllowed, make_target, send_schedule
from loadtest.driver.profiles import ArrivalProcess, Profile, Schedule
from loadtest.driver.run_result import BUSY, CACHE, LOST, NO_ANSWER, NO_CONNECTION, Run
from loadtest.observe.processes import find_free_port
from loadtest.observe.server_access import ServerAccess
from tests.loadtest.peer import Peer, run_peer
from tests.patience import PATIENCE_S, wait_until

ROOT = Path(__file__).parents[3]
WHERE_NOBODY_STALLS = " in a run in which the machine does not keep the driver or the peer waiting"


def load(peer: Peer, model: str = "hit", rate: float = 200, seconds: float = 0.5) -> tuple[Schedule, LoadTarget]:
    """A constant load on one model."""
    schedule = Profile(1, rate, arrivals=ArrivalProcess.CONSTANT).schedule(seconds)
    request = DIALECTS["sagemaker"].request("peer", model, b"{}" * 500)
    return schedule, make_target(f"http://127.0.0.1:{peer.port}", [request])


@pytest.mark.slow
def test_a_stall_is_seen_by_all_who_would_have_asked() -> None:
    """While a server stands still for 0.8 s, requests go on being due and sent: each waits for the rest of the stall.

    A closed loop of one connection would have seen one slow request, and a p90 as if nothing had been.
    """

    def is_seen() -> bool:
        with run_peer(Peer(stall_at=100, stall_s=0.8)) as peer:
            run = send_schedule(*load(peer, seconds=1.5))
        assert peer.asked == 300
        assert (run.status == 200).all()
        due = run.schedule.at[100:260] - run.schedule.at[100]  # those due within the stall, at 200/s
        waited = (run.latency[100:260] >= 0.8 - due - 0.001).all()
        return bool(waited and (run.sent[100:180] < run.schedule.at[100] + 0.8).all())  # its first half is sent within

    wait_until(is_seen, f"it is seen{WHERE_NOBODY_STALLS}")


@pytest.mark.slow
def test_waits_for_a_connection_count_and_are_called_out() -> None:
    """One connection to a server that takes 20 ms cannot carry 200/s: latency grows, and the run is invalid."""

    def is_called_out() -> bool:
        with run_peer(Peer(delay_s=0.02)) as peer:
            run = send_schedule(*load(peer), connections=1)
        assert peer.connections == 1
        assert (run.status == 200).all()
        assert run.latency[-1] > 1.0
        (reason,) = run.invalid()
        return reason.endswith(NO_CONNECTION)

    wait_until(is_called_out, f"the reason is the connections{WHERE_NOBODY_STALLS}")


class SlowToMake(Sequence[bytes]):
    """Requests that cost the driver 20 ms each."""

    def __init__(self, request: bytes) -> None:
        self._request = request

    def __len__(self) -> int:
        return 1

    @overload
    def __getitem__(self, index: int) -> bytes: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[bytes]: ...
    def __getitem__(self, index: int | slice) -> bytes | Sequence[bytes]:
        time.sleep(0.02)
        return self._request


@pytest.mark.slow
def test_an_overloaded_driver_calls_its_run_invalid() -> None:
    """A driver that needs 20 ms for each of 200 requests a second falls behind, and says that it was its own fault."""
    with run_peer(Peer()) as peer:
        schedule, to = load(peer)
        run = send_schedule(schedule, LoadTarget(to.host, to.port, SlowToMake(to.requests[0])))
    assert (run.status == 200).all()
    assert [reason.endswith(BUSY) for reason in run.invalid()] == [True]


@pytest.mark.slow
def test_what_was_never_sent_makes_a_run_invalid() -> None:
    """With its one connection stuck, the driver ends in time; the others are unsent, and have waited until the end."""
    with run_peer(Peer()) as peer:
        run = send_schedule(*load(peer, "silence"), connections=1, patience_s=0.5)
    assert run.ended >= 1.0  # the schedule's half a second and the patience
    assert np.isnan(run.sent).sum() == 99
    assert run.latency == pytest.approx(run.ended - run.schedule.at)
    assert "99 of 100 requests were never sent" in run.invalid()[0]


@pytest.mark.slow
def test_silence_counts_as_waiting() -> None:
    """Sent but not answered until the end: no answer, with the whole wait as latency, not left out."""
    with run_peer(Peer()) as peer:
        run = send_schedule(*load(peer, "silence"), patience_s=1.0)
    assert (run.status == NO_ANSWER).all()
    assert not np.isnan(run.sent).any()
    assert run.latency.min() > 0.9


@pytest.mark.slow
@pytest.mark.parametrize(("model", "status"), [("hit", 200), ("503", 503), ("hangup", LOST), ("bye", 200)])
def test_every_request_has_its_fate(model: str, status: int) -> None:
    """Answers, refusals, lost connections and ones that the server closes after each answer."""
    with run_peer(Peer()) as peer:
        run = send_schedule(*load(peer, model))
    assert (run.status == status).all()
    assert {CACHE[i] for i in run.cache} == ({"hit"} if model == "hit" else {""})
    assert (run.checked, list(run.unsound)) == (100 if status == 200 else 0, [])


@pytest.mark.slow
@pytest.mark.parametrize("connections", [1, 512])
def test_nobody_listens(connections: int) -> None:
    """Refused connections are lost requests, and the run ends with the last."""
    run = send_schedule(*load(Peer(port=find_free_port())), connections=connections, patience_s=PATIENCE_S)
    assert (run.status == LOST).all()
    assert run.ended < PATIENCE_S


@pytest.mark.slow
def test_a_lack_of_descriptors_is_our_own_fault() -> None:
    """Where a process may open no more files, requests are unsent, and the run invalid: none failed.

    The process is one of its own: in that of the tests others close files meanwhile.
    """
    command = [sys.executable, "-c", f"from {__name__} import *; {lack_descriptors.__name__}()"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def lack_descriptors() -> None:
    """Send a schedule where three files more can be opened, which the event loop needs, and look at the run."""
    schedule, to = load(Peer(port=find_free_port()))
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = [fd for fd in range(256) if not Path(f"/proc/self/fd/{fd}").exists()]
    resource.setrlimit(resource.RLIMIT_NOFILE, (free[3], hard))
    run = send_schedule(schedule, to, patience_s=0.1)
    assert (run.status == NO_ANSWER).all()
    assert "100 of 100 requests were never sent" in run.invalid()[0]


@pytest.mark.slow
def test_connections_are_kept() -> None:
    """A server that answers between two requests sees far fewer connections than requests."""

    def are_few() -> bool:
        with run_peer(Peer()) as peer:
            send_schedule(*load(peer))
        assert peer.asked == 100
        return peer.connections < 20

    wait_until(are_few, f"connections are kept{WHERE_NOBODY_STALLS}")


@pytest.mark.slow
def test_wrong_answers_are_noticed() -> None:
    """NaN with status 200 is not an answer."""
    with run_peer(Peer()) as peer:
        run = send_schedule(*load(peer, "nan"))
    assert len(run.unsound) == 100
    where, why = run.unsound[0]
    assert where == 0
    assert why.startswith("not JSON")


@pytest.mark.parametrize(
    ("late_s", "answer_s", "valid"),
    [(0.0049, 0.001, True), (0.0051, 0.001, False), (0.019, 0.1, True), (0.021, 0.1, False)],
)
def test_how_late_is_too_late(late_s: float, answer_s: float, valid: bool) -> None:
    """Lag p99 beyond 5 ms and 20 % of p50: only then; fewer than one late request in a hundred is no matter."""
    run = a_run(answer_s, late=20, late_s=late_s)
    assert (run.invalid() == []) == valid
    assert a_run(answer_s, late=9, late_s=1.0).invalid() == []


def test_how_much_unsent_is_too_much() -> None:
    """One in a thousand may be lost, two not."""
    run = a_run(0.001)
    run.sent[-1:] = np.nan
    assert run.invalid() == []
    run.sent[-2:] = np.nan
    assert run.invalid() == ["2 of 1000 requests were never sent"]


def a_run(answer_s: float, late: int = 0, late_s: float = 0.0) -> Run:
    """1000 requests, of which so many were sent late by so much."""
    at = np.arange(1000) / 100
    sent = at.copy()
    sent[:late] += late_s
    ones = np.ones(1000, np.int64)
    return Run(Schedule(at, ones, 10.0), sent.copy(), sent, at + answer_s, ones * 200, ones, 10.0, False, 0, [])


def test_only_this_machine_unless_told() -> None:
    """Addresses beyond loopback are refused before anything is sent, by what a name resolves to."""
    assert make_target("http://localhost:8080", []).port == 8080
    with pytest.raises(RemoteNotAllowed, match="--allow-remote"):
        make_target("http://192.0.2.7:8080", [])
    assert make_target("http://192.0.2.7", [], allow_remote=True) == LoadTarget("192.0.2.7", 80, [])
    secure = make_target("https://localhost", [])
    assert (secure.port, secure.tls_name) == (443, "localhost")
    for url in ("ftp://localhost", "localhost:8080", "http://localhost/path"):
        with pytest.raises(ValueError, match="http://HOST:PORT or https://HOST:PORT"):
            make_target(url, [])


@pytest.mark.slow
def test_a_load_over_tls_shows_what_the_server_asks_for(tmp_path: Path) -> None:
    """Every connection trusts the authority, shows the certificate, and every request the token; the representation of
    the target does not. Latency is measured as without TLS.
    """
    ca = trustme.CA()
    ca.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    ca.issue_cert("desk@example.org").private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "desk.pem"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ca.issue_cert("127.0.0.1").configure_cert(context)
    context.verify_mode = ssl.CERT_REQUIRED
    ca.configure_trust(context)
    access = ServerAccess(tmp_path / "ca.pem", tmp_path / "desk.pem", token="desk-secret")
    schedule = Profile(1, 200, arrivals=ArrivalProcess.CONSTANT).schedule(0.5)
    request = DIALECTS["sagemaker"].request("peer", "hit", b"{}", headers=access.headers)
    with run_peer(Peer(tls=context)) as peer:
        url = f"https://127.0.0.1:{peer.port}"
        to = make_target(url, [request], access=access)
        run = send_schedule(schedule, to)
        assert (run.status == 200).all()
        assert (run.cache == CACHE.index("hit")).all()
        assert peer.shown == {"Bearer desk-secret"}
        assert "desk-secret" not in repr(to)
        asked = peer.asked
        few = Profile(1, 200, arrivals=ArrivalProcess.CONSTANT).schedule(0.1)
        for unknown in (ServerAccess(tmp_path / "ca.pem"), ServerAccess(client_cert=tmp_path / "desk.pem")):
            refused = send_schedule(few, make_target(url, [request], access=unknown), patience_s=PATIENCE_S)
            assert (refused.status == LOST).all()
        assert peer.asked == asked

"""Three times what a server can do: the admitted are answered in time, others learn at once when to come back."""

import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from threading import Event

import httpx
import numpy as np
import pytest

from loadtest.driver.dialects import DIALECTS
from loadtest.driver.open_loop import make_target, send_schedule
from loadtest.driver.profiles import Schedule
from loadtest.driver.run_result import Run
from server.contract import HEADER_RETRY_AFTER_MS, HEADER_SERVER_TIMING, HEADER_TIMEOUT_MS
from tests.e2e.models import Model, pack_forecaster
from tests.e2e.server import Server, run_server, upload
from tests.patience import repeat_in_stalls, wait_until
from tests.s3 import S3Server

pytestmark = pytest.mark.e2e

SLOW = {"features": 2, "context_length": 168, "prediction_length": 4, "quantiles": 3, "hidden": 160}
DEADLINE_S = 1.0
SECONDS = 4.0
BURST = 300


@dataclass(frozen=True)
class Fleet:
    """A server whose models are all resident: one that is hot, and one that is asked now and then."""

    server: Server
    hot: Model
    other: Model

    def load(self, rate: float, seconds: float) -> Run:
        """So many requests a second for the hot model, each with the deadline, however slow the answers come."""
        asked = self.hot.question(0)
        host = self.server.url.removeprefix("http://")
        headers = {HEADER_TIMEOUT_MS: str(int(DEADLINE_S * 1e3))}
        request = DIALECTS["sagemaker"].request(host, asked.model, asked.body, headers=headers)
        at = np.arange(0.0, seconds, 1 / rate)
        schedule = Schedule(at, np.zeros(len(at), np.int64), seconds)
        return send_schedule(schedule, make_target(self.server.url, [request]), connections=1024)

    def measure_peak(self) -> float:
        """Answers a second of a burst that fills every batch."""
        asked = self.hot.question(0)
        host = self.server.url.removeprefix("http://")
        target = make_target(self.server.url, [DIALECTS["sagemaker"].request(host, asked.model, asked.body)])
        burst = Schedule(np.zeros(BURST), np.zeros(BURST, np.int64), 60.0)
        run = send_schedule(burst, target, connections=64)
        assert set(run.status) == {200}
        return BURST / run.ended


@pytest.fixture(scope="module")
def overloaded(s3: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """One worker and one front."""
    hot, other = (pack_forecaster(f"{name}.mar", seed, "gru", SLOW) for seed, name in enumerate(("hot", "other")))
    bucket = s3.bucket()
    upload(s3, bucket, [hot, other])
    with run_server(s3, tmp_path_factory.mktemp("overload"), f"s3://{bucket}", fronts=1) as server:
        for model in (hot, other):
            server.ask(model.question(0))
        yield Fleet(server, hot, other)


@dataclass(frozen=True)
class Probe:
    """One request of another client: how long it took, and what it was told."""

    status: int
    took_s: float
    headers: httpx.Headers

    @property
    def told_s(self) -> float:
        """The queue and the forward, as the server says."""
        parts = dict(part.strip().split(";dur=") for part in self.headers[HEADER_SERVER_TIMING].split(","))
        return (float(parts["queue"]) + float(parts["inference"])) / 1e3


def probe(fleet: Fleet, model: Model, until: Event, headers: dict[str, str]) -> list[Probe]:
    """Ask again and again."""
    found: list[Probe] = []
    with httpx.Client(timeout=60, trust_env=False) as client:
        target = {"X-Amzn-SageMaker-Target-Model": model.name, **headers}
        while not until.is_set():
            began = time.monotonic()
            reply = client.post(f"{fleet.server.url}/invocations", content=model.question(0).body, headers=target)
            found.append(Probe(reply.status_code, time.monotonic() - began, reply.headers))
            until.wait(0.1)
    return found


@dataclass(frozen=True)
class Overload:
    """What a load of three times the peak met, and what others were told meanwhile."""

    peak: float
    run: Run
    hot: list[Probe]
    other: list[Probe]


def run_overload(fleet: Fleet, peak: float) -> Overload:
    """Three times the peak, and two other clients: one of the hot model, one of the other."""
    done, deadline = Event(), {HEADER_TIMEOUT_MS: str(int(DEADLINE_S * 1e3))}
    with ThreadPoolExecutor(3) as pool:
        loading = pool.submit(fleet.load, 3 * peak, SECONDS)
        time.sleep(SECONDS / 4)  # until the queue is as long as it gets
        hot = pool.submit(probe, fleet, fleet.hot, done, deadline)
        other = pool.submit(probe, fleet, fleet.other, done, {})
        counted = partial(fleet.server.total, "fleetcast_requests_under_way")
        try:
            wait_until(lambda: counted() > 4 or loading.done(), "what waits is counted")
            was_counted = not loading.done()
            run = loading.result()
        finally:
            done.set()
        overload = Overload(peak, run, hot.result(), other.result())
    if (run.status != 200).any():
        assert was_counted, "what waits was not counted while the load lasted"
    return overload


def overload_server(fleet: Fleet) -> Overload:
    """The first load that is more than the server can do.

    Other programs may slow the burst that measures the peak. A server that answers all of a load was measured too low.
    """
    peak = fleet.measure_peak()
    for _ in range(5):
        overload = run_overload(fleet, peak)
        if (overload.run.status != 200).any():
            return overload
        peak *= 2
    pytest.fail(f"the server answered all of {3 * peak / 2:.0f} requests a second: no load of ours is too much for it")


def test_three_times_the_peak(overloaded: Fleet) -> None:
    """No success comes late, much of the peak is answered, refusals say when to come, and another model is served."""
    repeat_in_stalls(lambda _: judge_overload(overload_server(overloaded)))


def judge_overload(overload: Overload) -> None:
    """Raises AssertionError that says what was wrong."""
    peak, run, hot_probes, other_probes = overload.peak, overload.run, overload.hot, overload.other
    right = run.status == 200
    took = (run.done - run.sent)[right]
    refused = [each for each in hot_probes if each.status != 200]
    patience_s = 1.5 * DEADLINE_S + 2 * run.lag.max()  # a client that is late to send is late to read
    late = (took > patience_s).sum()
    assert late <= 0.01 * right.sum(), f"{late} answered as a success when the client had given it up"
    assert right.sum() > 0.1 * peak * SECONDS, f"{right.sum()} answered, the peak is {peak:.0f} a second"
    assert set(run.status) <= {200, 503, 424}
    assert (run.status == 503).sum() > (run.status == 424).sum(), "refused at once, not after the deadline"
    for each in refused:
        if each.status == 503:
            assert 0 < int(each.headers[HEADER_RETRY_AFTER_MS]) < 5000 * DEADLINE_S
            assert int(each.headers["Retry-After"]) >= 1
    assert {each.status for each in other_probes} == {200}
    assert statistics.median(each.took_s for each in other_probes) < 2 * float(np.median(took))
    waited = [each.told_s / each.took_s for each in hot_probes if each.status == 200]
    assert not waited or max(waited) > 0.1, "what the server says of the queue is what the client waits"


def test_after_the_overload_all_is_well(overloaded: Fleet) -> None:
    """Nothing is under way any more, and a request with the deadline is answered."""
    overloaded.load(2000, 1.0)
    server, asked = overloaded.server, overloaded.hot.question(0)
    wait_until(lambda: server.total("fleetcast_requests_under_way") == 0, "all is answered")
    headers = {HEADER_TIMEOUT_MS: str(int(DEADLINE_S * 1e3))}
    reply = wait_until(lambda: find_success(server.post(asked.model, asked.body, headers)), "it is answered in time")
    asked.check(reply.content)


def find_success(reply: httpx.Response) -> httpx.Response | None:
    """The reply, if it is no refusal."""
    return reply if reply.status_code == 200 else None

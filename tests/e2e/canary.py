"""A canary: one client that asks one model every 50 ms and compares every byte, while others attack the server.

Two things are judged. Every answer equals the first one, byte for byte, and none fails. And the slowest percent of the
answers stays within a bound: 100 ms on a quiet machine, which only its user can know to be one (`FLEETCAST_QUIET=1 make
test`). On any other the bound is what no mood of a machine reaches and each of the attacks once did: half a second, or
`SLOWER` times the slowest percent of the calm before the attack. An answer's time is what its server worked meanwhile,
all threads together, where that is less than what went by: on a busy machine the clock goes on while the server is not
let run. The figures are printed: pytest shows them beside a failure, and `pytest -rP` always.
"""

import http.client
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

from loadtest.observe.resource_counts import read_cpu_seconds
from tests.e2e.models import Question
from tests.e2e.server import Server
from tests.patience import PATIENCE_S, wait_until

PERIOD_S = 0.05
QUIET = os.environ.get("FLEETCAST_QUIET") == "1"
BOUND_S = 0.1 if QUIET else 0.5  #: of the slowest percent
STUCK_S = 10.0  #: of the slowest percent by the clock: who waits so long waits for something that does not work
SLOWER = 10.0  #: the same bound on a busy machine, in terms of the calm before the attack
LEAST = 110  #: answers that are judged
CALM = 40  #: answers before the attack that say how fast this machine is


@dataclass(slots=True)
class Beats:
    """What became of a span of requests: seconds of each answer, by the clock too, and what was wrong with others."""

    seconds: list[float] = field(default_factory=list)
    by_the_clock: list[float] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def slowest_percent(seconds: Sequence[float]) -> float:
    """The 99th percentile."""
    ordered = sorted(seconds)
    return ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))]


class Canary:
    """`with Canary(server, question) as canary: attack()`; leaving the block judges the attack's span.

    The question's model is asked by one kept-alive connection; it is opened anew where the server ends it.
    """

    def __init__(self, server: Server, question: Question) -> None:
        self._server, self._question = server, question
        self._calm, self._attack = Beats(), Beats()
        self._beats = self._calm
        self._first: bytes | None = None
        self._pids: list[int] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="canary")

    def __enter__(self) -> Self:
        self._pids = [row["pid"] for kind in ("front", "worker") for row in self._server.processes(kind)]
        connection, answer = self._ask(None)  # loads the model
        connection.close()
        self._question.check(answer)
        self._thread.start()
        wait_until(lambda: len(self._calm.seconds) + len(self._calm.problems) >= CALM, "the canary's calm")
        self._beats = self._attack
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:  # of fewer answers the slowest percent would be the slowest one
            self.more(max(0, LEAST - len(self._attack.seconds)))
        self._stop.set()
        self._thread.join()
        if kind is None:
            self.check()

    def __repr__(self) -> str:
        """For example `<Canary 212 answers, slowest percent 12.1 ms (calm 3.0 ms), 0 problems>`."""
        calm, attack = (slowest_percent(beats.seconds or [0.0]) * 1e3 for beats in (self._calm, self._attack))
        problems = len(self._calm.problems) + len(self._attack.problems)
        count = len(self._attack.seconds)
        return f"<Canary {count} answers, slowest percent {attack:.1f} ms (calm {calm:.1f} ms), {problems} problems>"

    def more(self, count: int) -> None:
        """Wait for `count` further requests, so that what an attack leaves behind is seen as well."""
        goal = len(self._attack.seconds) + len(self._attack.problems) + count
        wait_until(lambda: len(self._attack.seconds) + len(self._attack.problems) >= goal, f"{count} more")

    def check(self) -> None:
        """Raises AssertionError that says what the canary saw."""
        assert not self._calm.problems + self._attack.problems, (self, self._calm.problems, self._attack.problems)
        assert self._attack.seconds, "the attack was over before the canary asked once: ask for `more`"
        print(self)  # noqa: T201 -- the figures are for who reads the report
        bound = BOUND_S if QUIET else max(BOUND_S, SLOWER * slowest_percent(self._calm.seconds))
        assert slowest_percent(self._attack.seconds) <= bound, self
        assert slowest_percent(self._attack.by_the_clock) <= STUCK_S, self

    def _read_work(self) -> float:
        """Processor seconds of the server's fronts and workers so far."""
        return sum(read_cpu_seconds(pid) for pid in self._pids)

    def _ask(self, connection: http.client.HTTPConnection | None) -> tuple[http.client.HTTPConnection, bytes]:
        host, port = self._server.address
        connection = connection or http.client.HTTPConnection(host, port, timeout=PATIENCE_S)
        headers = {"Content-Type": "application/json", "X-Amzn-SageMaker-Target-Model": self._question.model}
        connection.request("POST", "/invocations", self._question.body, headers)
        answer = connection.getresponse()
        body = answer.read()
        if answer.status != http.client.OK:
            raise http.client.HTTPException(f"{answer.status} {body[:200]!r}")
        return connection, body

    def _run(self) -> None:
        connection: http.client.HTTPConnection | None = None
        due = time.monotonic()
        while not self._stop.is_set():
            beats, started = self._beats, time.monotonic()
            try:
                worked = self._read_work()
                connection, body = self._ask(connection)
                worked = self._read_work() - worked
            except (OSError, http.client.HTTPException) as error:
                beats.problems.append(repr(error))
                connection = None
            else:
                passed = time.monotonic() - started
                beats.by_the_clock.append(passed)
                beats.seconds.append(min(passed, worked))
                self._first = self._first or body
                if body != self._first:
                    beats.problems.append(f"answered {body[:200]!r}, before {self._first[:200]!r}")
            due = max(due + PERIOD_S, time.monotonic())
            self._stop.wait(max(0.0, due - time.monotonic()))
        if connection is not None:
            connection.close()

"""One turn of a market's cycle as a client runs it: one call gets the quantiles of all products from their prices, a
second call gets joint scenarios. Every stage is timed. The client blocks and has one connection.
"""

import http.client
import io
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from types import MappingProxyType
from typing import Self
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt
import orjson

from handlers.training.time_series import Float64, Series
from model_store.names import ModelName
from server.contract import FORECASTS_PATH, HEADER_CACHE, HEADER_SERVER_TIMING, JSON, NPY

Float32 = npt.NDArray[np.float32]

BUDGET_S = 20.0  #: seconds from the prices of a market to the deadline of its bids
PRICES, WRITE, TICK, JOINT, READ = "prices in", "requests written", "quantiles", "joint scenarios", "answers read"
STAGES = (PRICES, WRITE, TICK, JOINT, READ)
PATIENCE_S = 60.0


class NotAnswered(RuntimeError):
    """The server did not answer a call, or not for every product; the message has the cause."""


class Feed:
    """The published prices of some products: the last `keep` intervals; every line adds one."""

    def __init__(self, history: Sequence[Series], keep: int) -> None:
        first = history[0]
        self.step: timedelta = first.step
        self.next: datetime = first.start + len(first.values) * first.step
        self.rows: Float64 = np.stack([each.values for each in history], axis=1)[-keep:]  # [keep, products]

    def __repr__(self) -> str:
        return f"<Feed {self.rows.shape[1]} products, next {self.next}>"

    def publish(self, line: str) -> None:
        """Add the next interval, `stamp,price,price,...`; an empty price is missing. Raises ValueError else."""
        stamp, *prices = line.split(",")
        if datetime.fromisoformat(stamp) != self.next or len(prices) != self.rows.shape[1]:
            raise ValueError(f"expected {self.next} and {self.rows.shape[1]} prices, not {line[:60]!r}")
        row = [float(price) if price else np.nan for price in prices]
        self.rows = np.concatenate([self.rows[1:], [row]])
        self.next += self.step

    def requests(self, models: Mapping[str, ModelName], history: int) -> list[dict[str, object]]:
        """Make the request of each model: the last `history` prices of its product. NaN is written as null."""
        start = (self.next - history * self.step).isoformat(sep=" ", timespec="seconds")
        columns = self.rows[-history:].T.tolist()
        return [
            {"target_model": model, "start": start, "target": column}
            for model, column in zip(models.values(), columns, strict=True)
        ]


@dataclass(frozen=True, slots=True)
class MarketFleet:
    """The models: product -> model, the correlation archive, the steps of history in a request, the unit of prices."""

    models: Mapping[str, ModelName]
    correlation: ModelName
    history: int
    unit: str = ""


@dataclass(frozen=True, slots=True)
class TurnBodies:
    """The two bodies of a turn."""

    quantiles: bytes
    scenarios: bytes


@dataclass(frozen=True, slots=True, eq=False)
class Turn:
    """The results of one turn: milliseconds by stage, cache result and server timing by call, and the answers.

    `quantiles` [products, steps, levels], `scenarios` [scenarios, products, steps].
    """

    start: str  #: time of the first forecast step
    ms: Mapping[str, float]
    said: Mapping[str, str]
    asked: TurnBodies
    levels: Sequence[float]
    quantiles: Float64
    scenarios: Float32

    @property
    def total_ms(self) -> float:
        """Milliseconds from the prices to the scenarios."""
        return sum(self.ms.values())


class MarketClient:
    """A connection to the inference listener of a server. Use it in a `with` statement."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme != "http" or not parts.netloc:
            raise ValueError(f"{url!r} is no server's address: give http://HOST:PORT")
        self.url = url.rstrip("/")
        self._connection = http.client.HTTPConnection(parts.netloc, timeout=PATIENCE_S)

    def __repr__(self) -> str:
        return f"<MarketClient {self.url}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def forecasts(self, body: bytes, accept: str = JSON) -> tuple[bytes, str]:
        """Call for many models; returns the answer and its headers. Raises NotAnswered."""
        try:
            headers = {"Content-Type": JSON, "Accept": accept}
            self._connection.request("POST", FORECASTS_PATH, body, headers)
            reply = self._connection.getresponse()
            answer = reply.read()
        except (OSError, http.client.HTTPException) as error:
            self._connection.close()
            raise NotAnswered(f"{self.url} does not answer: {error!r}; is `fleetcast serve` running there?") from error
        if reply.status != http.HTTPStatus.OK:
            raise NotAnswered(f"{self.url} answered {reply.status}: {answer[:500].decode(errors='replace')}")
        return answer, f"{reply.headers[HEADER_CACHE]}; {reply.headers[HEADER_SERVER_TIMING]}"


def run_turn(feed: Feed, line: str, fleet: MarketFleet, client: MarketClient, scenarios: int, seed: int) -> Turn:
    """Publish a line, send both calls, and read the answers. Raises NotAnswered, ValueError for a line out of order."""
    ms: dict[str, float] = {}
    with _time_stage(ms, PRICES):
        feed.publish(line)
    with _time_stage(ms, WRITE):
        asked = write_turn_bodies(feed.requests(fleet.models, fleet.history), fleet.correlation, scenarios, seed)
    with _time_stage(ms, TICK):
        tick, tick_said = client.forecasts(asked.quantiles)
    with _time_stage(ms, JOINT):
        joint, joint_said = client.forecasts(asked.scenarios, NPY)
    with _time_stage(ms, READ):
        levels, quantiles = read_quantiles(tick, list(fleet.models))
        found: Float32 = np.load(io.BytesIO(joint), allow_pickle=False)
    said, start = {TICK: tick_said, JOINT: joint_said}, feed.next.isoformat(sep=" ", timespec="seconds")
    return Turn(start, MappingProxyType(ms), said, asked, levels, quantiles, found)


def write_turn_bodies(
    requests: Sequence[Mapping[str, object]], correlation: ModelName, scenarios: int, seed: int
) -> TurnBodies:
    """Write the bodies of both calls; their histories are the same and encoded once."""
    written = b'{"requests":' + orjson.dumps(requests) + b',"configuration":'
    drawn = {"joint": True, "correlation": correlation, "num_samples": scenarios, "seed": seed}
    tick = orjson.dumps({"output_types": ["quantiles"]})
    return TurnBodies(written + tick + b"}", written + orjson.dumps(drawn) + b"}")


def read_quantiles(answer: bytes, products: Sequence[str]) -> tuple[Sequence[float], Float64]:
    """Read levels and quantiles [products, steps, levels]. Raises NotAnswered that names the first missing product."""
    found = orjson.loads(answer)
    for product, each in zip(products, found["predictions"], strict=True):
        if "error" in each:
            more = f" ({found['failed']} of {len(products)} failed)"
            raise NotAnswered(f"no forecast of {product}: {each['error']['message']}{more}")
    levels = sorted(found["predictions"][0]["quantiles"], key=float)
    rows = [[each["quantiles"][level] for level in levels] for each in found["predictions"]]
    return [float(level) for level in levels], np.array(rows).transpose(0, 2, 1)


def rank_correlation(scenarios: Float32) -> Float64:
    """Return Spearman's coefficients [n, n] of the products in scenarios [s, n, t], averaged over the steps."""
    count, _, steps = scenarios.shape
    ranks = scenarios.argsort(axis=0, kind="stable").argsort(axis=0) - (count - 1) / 2
    by_step = ranks.transpose(2, 1, 0)
    return np.asarray((by_step @ by_step.swapaxes(1, 2)).sum(axis=0) / (steps * count * (count**2 - 1) / 12))


@contextmanager
def _time_stage(ms: dict[str, float], stage: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    ms[stage] = (time.perf_counter() - started) * 1e3

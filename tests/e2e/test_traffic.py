"""The cache under traffic: answers and counts are right, evictions are in order, and requests share loads."""

import asyncio
import threading
from collections import Counter, OrderedDict
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from tests.e2e.conftest import Serve
from tests.e2e.models import (
    FORECAST_TCN,
    SMALL_MLP,
    SMALL_TCN,
    Model,
    Question,
    onnx_model,
    pack_fleet,
    pack_forecaster,
)
from tests.e2e.server import PROMTOOL, Answer, Server, lint, request_bytes, run_server, upload
from tests.patience import wait_until
from tests.s3 import S3Server

pytestmark = pytest.mark.e2e

PREFIX = "prod/models/"
SLAB = 80 * 1024  #: one real 17.5k-parameter tcn, or four of 32 channels in two layers
WIDE = {"channels": 32}
CLIENTS, REQUESTS = 4, 500
MARKETS = ("au/nsw1", "au/qld1", "eu/de-lu", "eu/fr", "us/caiso/np15", "us/ercot/north")
HERD = 1000


@pytest.fixture(scope="module")
def archives(s3: S3Server) -> tuple[str, list[Model]]:
    """300 archives of all kinds in a hierarchy of prefixes, in one bucket."""
    names = [f"{MARKETS[i % len(MARKETS)]}/product-{i:03}.mar" for i in range(300)]
    models = []
    for i, name in enumerate(names):
        if i % 50 == 49:
            models.append(onnx_model(name, i))
        elif i % 10 == 3:
            models.append(pack_forecaster(name, i, "tcn", {}))
        elif i % 10 == 5:
            models.append(pack_forecaster(name, i, "tcn", {**FORECAST_TCN, **WIDE}, forecast=True))
        elif i % 20 == 7:
            models.append(pack_forecaster(name, i, "mlp", SMALL_MLP))
        else:
            models.append(pack_forecaster(name, i, "tcn", {**SMALL_TCN, **WIDE}))
    bucket = s3.bucket()
    upload(s3, bucket, models, PREFIX)
    return bucket, models


def draw_questions(models: list[Model], client: int) -> list[Question]:
    """One client's questions: popularity 1/rank, the same for the same client."""
    rng = np.random.default_rng(client)
    weights = 1 / np.arange(1, len(models) + 1)
    ranks = rng.choice(len(models), REQUESTS, p=weights / weights.sum())
    return [models[rank * 7 % len(models)].question(int(rng.integers(8))) for rank in ranks]


def test_zipf_traffic_is_answered_right_and_counted_truly(
    s3: S3Server, tmp_path: Path, archives: tuple[str, list[Model]]
) -> None:
    """300 archives, room for about 50, three workers, two fronts: every answer is the nn.Module's, the cache's counts
    are the requests, the answers' headers add up to the counts, and memory stays within its budget.
    """
    bucket, models = archives
    budget = 3 * 6 * SLAB
    settings = {"workers": 3, "fronts": 2, "model_cache_bytes": budget, "slab_bytes": SLAB}
    with run_server(s3, tmp_path, f"s3://{bucket}/{PREFIX}", **settings) as server:
        seen: Counter[str] = Counter()
        with ThreadPoolExecutor(CLIENTS) as pool:
            for caches in pool.map(partial(_drive, server, models), range(CLIENTS)):
                seen.update(caches)
        counted = {
            result: server.total("fleetcast_model_cache_requests_total", result=result)
            for result in ("hit", "miss", "coalesced")
        }
        assert sum(counted.values()) == CLIENTS * REQUESTS
        assert {result: seen[result] for result in counted} == counted
        assert server.total("fleetcast_inference_requests_total", code="200") == CLIENTS * REQUESTS
        _within_budget(server, budget)
        if PROMTOOL:
            assert lint(server.exposition()) == ""


def _drive(server: Server, models: list[Model], client: int) -> list[str]:
    boto = server.client()
    return [server.ask(question, boto).cache for question in draw_questions(models, client)]


def _within_budget(server: Server, budget: int) -> None:
    used = server.total("fleetcast_model_cache_bytes", tier="device")
    loaded = server.total("fleetcast_loaded_models")
    assert 0 < used <= server.total("fleetcast_model_cache_capacity_bytes", tier="device") <= budget
    assert 30 <= loaded <= 80, f"{loaded} models in a cache for about 50"
    assert loaded == len(server.resident())
    assert server.total("fleetcast_model_evictions_total", tier="device") > 0
    assert server.total("fleetcast_model_loading_seconds_count", tier="disk") > 0, "nothing came back from disk"


def test_evictions_follow_exact_lru_order(s3: S3Server, store: str, serve: Serve) -> None:
    """One worker, room for R models, seeded traffic over R + 8: each answer's hit or miss, and who is resident after
    each, is what a textbook LRU of R places says.
    """
    models = {model.name: model for model in pack_fleet("lru", 19)}
    upload(s3, store, list(models.values()))
    with serve(model_cache_bytes=65536, slab_bytes=65536) as server:
        names = list(models)
        server.ask(models[names[0]].question(0))
        places = 65536 // server.models()[names[0]]["holders"][0]["bytes"]
        assert places == len(names) - 8
        expected = OrderedDict([(names[0], None)])
        rng = np.random.default_rng(3)
        for at in [*range(1, 19), *rng.integers(0, 19, 120).tolist()]:
            name = names[at]
            hit = name in expected
            expected[name] = None
            expected.move_to_end(name)
            if len(expected) > places:
                expected.popitem(last=False)
            assert server.ask(models[name].question(at)).cache == ("hit" if hit else "miss")
            assert server.resident() == set(expected)


def test_a_thousand_first_calls_are_one_load(s3: S3Server, store: str, serve: Serve) -> None:
    """However many ask for a model that is not here: one GET, 1 miss, 999 coalesced, everyone answered right."""
    model = pack_forecaster("au/nsw1/energy.mar", 5)
    upload(s3, store, [model])
    question = model.question(1)
    with serve(workers=2, fronts=2) as server:
        with s3.hold(f"{store}/{model.name}") as loading:
            answers = asyncio.run(_ask_at_once(server, question, loading))
        for answer in answers:
            question.check(answer.body)
        assert Counter(answer.cache for answer in answers) == {"miss": 1, "coalesced": HERD - 1}
        assert s3.seen("GET", f"{store}/{model.name}") in ([200], [206])
        assert server.total("fleetcast_model_cache_requests_total", result="miss") == 1
        assert server.total("fleetcast_model_cache_requests_total", result="coalesced") == HERD - 1


async def _ask_at_once(server: Server, question: Question, loading: threading.Event) -> list[Answer]:
    """A connection for each of a thousand clients, all asking before the model is loaded."""
    host, port = server.address

    async def ask() -> Answer:
        reader, writer = await asyncio.open_connection(host, port)
        writer.write(request_bytes(question))
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        assert head[0].startswith("HTTP/1.1 200"), head
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:] if line)}
        body = await reader.readexactly(int(headers["content-length"]))
        writer.close()
        await writer.wait_closed()
        return Answer(body, headers)

    def load_once_all_wait() -> None:
        wait_until(lambda: server.total("fleetcast_model_cache_requests_total") == HERD, "all clients wait")
        loading.set()

    async with asyncio.TaskGroup() as group:
        group.create_task(asyncio.to_thread(load_once_all_wait))
        asked = [group.create_task(ask()) for _ in range(HERD)]
    return [each.result() for each in asked]

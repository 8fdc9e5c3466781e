"""Stores that hang, for some keys or for all: what is on disk is served meanwhile, and renewed when they are back."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.e2e.conftest import Serve
from tests.e2e.models import Model, pack_fleet, pack_forecaster
from tests.e2e.server import Server, upload
from tests.e2e.test_stalls import ask_readiness
from tests.patience import wait_until
from tests.s3 import S3Server

pytestmark = pytest.mark.e2e

HUNG = 8
MANY = 10_000  # requests: more than there are retries


def load_from_disk(server: Server, models: Sequence[Model]) -> None:
    """Unload each model and ask for it: its numbers are right, and they came from disk."""
    for model in models:
        server.fleet("unload", model.name)
        answer = server.ask(model.question(1))
        assert answer.cache == "miss"
        assert 'desc="disk"' in answer.headers["server-timing"]


def test_models_on_disk_do_not_wait_for_keys_that_hang(s3: S3Server, store: str, serve: Serve) -> None:
    """Eight keys hang, more than there are loader threads: models that are fresh on disk are loaded meanwhile, without
    a store request, others are fetched, and the store is not said to fail. Once they are answered, the eight serve too.
    """
    on_disk, hung, others = pack_fleet("disk", 6), pack_fleet("hung", HUNG), pack_fleet("others", 2)
    upload(s3, store, [*on_disk, *hung, *others])
    with serve(loader_threads=4) as server, ThreadPoolExecutor(HUNG) as pool:
        for model in on_disk:
            server.ask(model.question(0))
        asked = len(s3.seen("GET", f"{store}/{on_disk[0].name.rpartition('/')[0]}"))
        with s3.hold(f"{store}/{hung[0].name.rpartition('/')[0]}", MANY):
            loading = [pool.submit(server.ask, model.question(0)) for model in hung]
            wait_until(
                lambda: server.total("fleetcast_model_cache_requests_total") == 6 + HUNG, "all eight are loading"
            )
            load_from_disk(server, on_disk)
            for model in others:
                assert server.ask(model.question(0)).cache == "miss"
            assert ask_readiness(server) == (200, [{"worker": 0, "state": "ready"}])
            assert server.total("fleetcast_loads_under_way", lane="store") == HUNG
            assert not any(future.done() for future in loading)
        for future in loading:
            future.result()
        assert len(s3.seen("GET", f"{store}/{on_disk[0].name.rpartition('/')[0]}")) == asked


def test_due_copies_are_served_while_the_store_hangs(s3: S3Server, store: str, serve: Serve) -> None:
    """All copies are due, and the store answers nothing: each is served stale, the outage is said, and when the store
    is back what has changed is swapped in without a request.
    """
    models = pack_fleet("due", 5)
    old, new = pack_forecaster("due/changed.mar", 1), pack_forecaster("due/changed.mar", 2)
    before = upload(s3, store, [*models, old])[old.name]
    with serve(revalidate_s=0.05) as server:
        for model in (*models, old):
            server.ask(model.question(0))
        after = upload(s3, store, [new])[new.name]
        with s3.hold(store, MANY):
            load_from_disk(server, [*models, old])  # the last one is due by then: the first one waits a second
            assert server.ask(old.question(1)).version == before
            wait_until(lambda: "store_failing_s" in ask_readiness(server)[1][0], "the store is said to fail")
            assert ask_readiness(server)[0] == 200
            load_from_disk(server, models)
        wait_until(lambda: server.models()[new.name]["holders"][0]["version"] == after, "the new version is swapped in")
        assert server.ask(new.question(0)).version == after
        wait_until(
            lambda: "store_failing_s" not in ask_readiness(server)[1][0], "the store is not said to fail any more"
        )

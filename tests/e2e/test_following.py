"""Resident models follow the store by themselves: two workers hold a model while its archive is replaced under load."""

import os
import signal
from functools import partial
from hashlib import md5
from typing import Any

import numpy as np
import pytest

from handlers.forecasters import build_family, random_tensors
from handlers.kinds import ArchiveParts, pack_model
from model_store.archives.manifest import GoldenSample, Kind
from tests.e2e.conftest import Serve
from tests.e2e.models import SMALL_TCN, Model, Question, pack_forecaster
from tests.e2e.server import Answer, Load, Server, invoke, upload
from tests.patience import wait_until
from tests.s3 import S3Server

pytestmark = pytest.mark.e2e

NAME = "au/nsw1.mar"


def forecaster_with_bad_golden(seed: int) -> bytes:
    """An archive of NAME that loads, and whose golden sample its weights do not reproduce."""
    model, tensors = pack_forecaster(NAME, seed), random_tensors(build_family("tcn", SMALL_TCN), seed)
    x = np.ones(model.shape, np.float32)
    golden = GoldenSample(request={"x": x.tolist()}, response={"predictions": (model.run(x) + 0.5).tolist()})
    parts = ArchiveParts(tensors=tensors, architecture="tcn", config=SMALL_TCN)
    return pack_model(Kind.FORECASTER, parts, model_name="nsw1", golden=golden)


def hold_by_both(server: Server, model: Model) -> None:
    """Have both workers hold the model: while its home is stopped, the other one answers."""
    server.ask(model.question(0))
    (home,) = server.models()[model.name]["holders"]
    pid = next(row["pid"] for row in server.processes("worker") if row["index"] == home["worker"])
    os.kill(pid, signal.SIGSTOP)
    server.ask(model.question(0))
    os.kill(pid, signal.SIGCONT)
    wait_until(lambda: len(server.models()[model.name]["holders"]) == 2, "both workers hold the model")


def served_versions(server: Server) -> set[str]:
    """What the holders serve now."""
    return {holder["version"] for holder in server.models()[NAME]["holders"] if holder["state"] == "ready"}


def test_holders_follow_a_changed_archive_under_load_and_keep_from_a_bad_one(
    s3: S3Server, store: str, serve: Serve
) -> None:
    """Replaced twice, by a good and by a bad version, while clients ask and without a call to the server: every answer
    is right for the version that it names; both holders swap to the good one, and the bad one replaces nothing and is
    counted once for each of them.
    """
    old, new = pack_forecaster(NAME, 1), pack_forecaster(NAME, 2)
    before = upload(s3, store, [old])[NAME]
    right = {before: old.question(0)}

    def ask(question: Question, client: Any) -> Answer:
        answer = invoke(client, question.model, question.body)
        right[answer.version].check(answer.body)
        return answer

    with serve(workers=2, revalidate_s=2, worker_timeout_s=60) as server:
        hold_by_both(server, old)
        with Load(server, [right[before]], ask=ask) as load:
            load.more(10)
            after = md5(new.data, usedforsecurity=False).hexdigest()  # its ETag: answers may come before the reply does
            right[after] = new.question(0)
            assert upload(s3, store, [new]) == {NAME: after}
            wait_until(lambda: served_versions(server) == {after}, "both holders have swapped")
            load.more(10)
            s3.put(store, NAME, forecaster_with_bad_golden(3))
            failed = partial(server.total, "fleetcast_model_swaps_total", result="failed")
            wait_until(lambda: failed() == 2, "both holders have refused the bad version")
            load.more(10)
        assert [outcome.problem for outcome in load.outcomes if outcome.problem] == []
        versions = [outcome.version for outcome in load.outcomes]
        assert (set(versions[:10]), set(versions[-10:])) == ({before}, {after})
        assert served_versions(server) == {after}
        assert server.total("fleetcast_model_swaps_total", result="ok") == 2
        # Once for each version, and once more where a round finds a holder that is still loading.
        assert server.total("fleetcast_store_checks_total", result="changed") >= 2
        unchanged = partial(server.total, "fleetcast_store_checks_total", result="unchanged")
        wait_until(lambda: unchanged() >= 2, "the bad version is left alone in the rounds that follow")
        assert failed() == 2


def test_an_event_of_the_store_is_followed_at_once(s3: S3Server, store: str, serve: Serve) -> None:
    """With `watch_store` off nothing is compared; S3's notification of the new archive reloads it where it is resident.
    What is no notification is 400, and too long a body 413.
    """
    old, new = pack_forecaster(NAME, 1), pack_forecaster(NAME, 2)
    upload(s3, store, [old])
    with serve(watch_store="off", revalidate_s=1) as server:
        server.ask(old.question(0))
        after = upload(s3, store, [new])[NAME]
        events = f"{server.addresses['management']}/fleet/events"
        key = {"key": "au%2Fnsw1.mar"}
        record = {"eventName": "ObjectCreated:Put", "s3": {"bucket": {"name": store}, "object": key}}
        other = {**record, "s3": {"bucket": {"name": "other"}, "object": key}}
        reply = server.http.post(events, json={"Records": [record, other]})
        assert (reply.status_code, reply.json()) == (202, {"accepted": 1, "ignored": 1})
        wait_until(lambda: served_versions(server) == {after}, "the event is followed")
        assert server.ask(new.question(0)).cache == "hit"
        assert server.total("fleetcast_store_checks_total") == 0
        bad, long = server.http.post(events, content=b"[]"), server.http.post(events, content=b" " * 300_000)
        assert (bad.status_code, long.status_code) == (400, 413)
        assert server.http.get(events).status_code == 405

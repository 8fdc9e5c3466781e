"""Archives come, change and go while the server runs; the disk tier survives a restart and a lost store."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError

from tests.e2e.conftest import Serve
from tests.e2e.models import Model, Question, pack_fleet, pack_forecaster
from tests.e2e.server import Answer, Load, Server, invoke, is_answered, run_server, upload
from tests.patience import wait_until
from tests.s3 import S3Server

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def running(s3: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, str]]:
    """A server that asks the store again after a minute, and its bucket."""
    bucket = s3.bucket()
    with run_server(s3, tmp_path_factory.mktemp("changes"), f"s3://{bucket}", revalidate_s=60) as server:
        yield server, bucket


def read_refusal(server: Server, model: Model) -> tuple[int, str, str]:
    """Status, code and message of a request that must be refused."""
    with pytest.raises(ClientError) as caught:
        server.ask(model.question(0))
    response = caught.value.response
    return response["ResponseMetadata"]["HTTPStatusCode"], response["Error"]["Code"], response["Error"]["Message"]


def test_an_added_archive_is_served_at_once(s3: S3Server, running: tuple[Server, str]) -> None:
    """New in the store: the first call is answered; asked for too early (400, key named), it serves within 2 s."""
    server, bucket = running
    early, late = pack_fleet("new", 2)
    status, code, message = read_refusal(server, early)
    assert (status, code) == (400, "ValidationError")
    assert early.name in message
    upload(s3, bucket, [early, late])
    assert server.ask(late.question(1)).cache == "miss"
    wait_until(partial(is_answered, server, early), "an archive asked for too early is served")


def test_a_removed_archive_serves_while_resident_and_is_gone_once_unloaded(
    s3: S3Server, store: str, serve: Serve
) -> None:
    """Removed from the store: the resident model keeps serving, also when a reload finds it gone (404); after an unload
    its disk copy serves until it is due; then 400 names the key.
    """
    (model,) = pack_fleet("removed", 1)
    upload(s3, store, [model])
    with serve(revalidate_s=1.5) as server:
        server.ask(model.question(0))
        s3.delete(store, model.name)
        reload = server.fleet("reload", model.name)
        assert reload.status_code == 404
        assert model.name in reload.json()["error"]["message"]
        assert server.ask(model.question(1)).cache == "hit"
        assert server.total("fleetcast_model_swaps_total", result="failed") == 1
        assert server.fleet("unload", model.name).json()["unloaded_from"] == [0]
        wait_until(lambda: not is_answered(server, model), "the removed archive is refused")
        status, code, message = read_refusal(server, model)
        assert (status, code) == (400, "ValidationError")
        assert model.name in message


def test_an_unloaded_archive_serves_from_disk_until_it_is_due(s3: S3Server, running: tuple[Server, str]) -> None:
    """Unload and ask again within `revalidate_s`: from disk, without any store request."""
    server, bucket = running
    (model,) = pack_fleet("due", 1)
    upload(s3, bucket, [model])
    server.ask(model.question(0))
    server.fleet("unload", model.name)
    answer = server.ask(model.question(1))
    assert answer.cache == "miss"
    assert 'desc="disk"' in answer.headers["server-timing"]
    assert len(s3.seen("GET", f"{bucket}/{model.name}")) == 1


def test_a_changed_archive_is_swapped_in_without_a_failed_request(s3: S3Server, store: str, serve: Serve) -> None:
    """Replaced in the store and reloaded under load: every request is answered, by the old or the new numbers as its
    version says, and from the reload's reply on by the new ones.
    """
    old, new = pack_forecaster("au/nsw1.mar", 1), pack_forecaster("au/nsw1.mar", 2)
    before = upload(s3, store, [old])[old.name]
    right = {before: old.question(0)}

    def ask(question: Question, client: Any) -> Answer:
        answer = invoke(client, question.model, question.body)
        right[answer.version].check(answer.body)
        return answer

    with serve(workers=2, fronts=2) as server:
        with Load(server, [right[before]], ask=ask) as load:
            load.more(20)
            after = upload(s3, store, [new])[new.name]
            right[after] = new.question(0)
            load.more(20)
            assert server.fleet("reload", new.name).json()["version"] == after
            assert server.ask(right[after]).version == after
            load.more(20)
        assert [outcome.problem for outcome in load.outcomes if outcome.problem] == []
        versions = [outcome.version for outcome in load.outcomes]
        assert set(versions[:40]) == {before}
        assert set(versions[-10:]) == {after}
        assert server.total("fleetcast_model_swaps_total", result="ok") == 1


def test_a_bad_new_version_leaves_the_old_one_serving(s3: S3Server, running: tuple[Server, str]) -> None:
    """Replaced by rubbish: the reload fails with the cause (422), the old numbers go on serving as hits."""
    server, bucket = running
    (model,) = pack_fleet("bad", 1)
    version = upload(s3, bucket, [model])[model.name]
    server.ask(model.question(0))
    s3.put(bucket, model.name, b"PK\x03\x04 rubbish")
    reload = server.fleet("reload", model.name)
    assert reload.status_code == 422
    assert model.name in reload.json()["error"]["message"]
    answer = server.ask(model.question(1))
    assert (answer.cache, answer.version) == ("hit", version)


def test_a_restart_keeps_the_disk_tier_and_an_outage_is_survived(s3: S3Server, store: str, tmp_path: Path) -> None:
    """Restarted, the server reads its disk: no GET within `revalidate_s`. With the store down and all copies due, they
    are served stale; a model that was never here is 503, not 400: nobody can say that it is missing.
    """
    *known, stranger = pack_fleet("restart", 5)
    upload(s3, store, [*known, stranger])
    start = partial(run_server, s3, tmp_path, f"s3://{store}")
    with start(revalidate_s=600) as server:
        for model in known:
            server.ask(model.question(0))
    requests = len(s3.seen("GET", store))
    with start(revalidate_s=600) as server:
        for model in known:
            answer = server.ask(model.question(0))
            assert answer.cache == "miss"
            assert 'desc="disk"' in answer.headers["server-timing"]
        assert len(s3.seen("GET", store)) == requests
    with start(revalidate_s=0.05) as server, s3.outage(store):
        for model in known:
            server.ask(model.question(1))
        assert read_refusal(server, stranger)[:2] == (503, "ServiceUnavailable")
        wait_until(lambda: "serving_stale" in server.said(), "the log says so")

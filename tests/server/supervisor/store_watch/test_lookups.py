"""How the watch asks a store: by one listing or one by one, whichever is cheaper and permitted."""

import asyncio
from collections.abc import Sequence

import pytest

from model_store.names import ModelName
from model_store.stores.object_store import open_source
from server.supervisor.store_watch import lookups as store_lookups
from server.supervisor.store_watch.lookups import Found, StoreLookups
from tests.s3 import Fault, S3Server


def name_models(count: int) -> list[ModelName]:
    """Names below one folder."""
    return [ModelName(f"au/{i:02}.mar") for i in range(count)]


def fill(s3: S3Server, bucket: str, models: Sequence[ModelName]) -> dict[ModelName, str]:
    """Put the archives; their versions."""
    return {model: s3.put(bucket, model, model.encode()) for model in models}


def find(lookups: StoreLookups, models: Sequence[ModelName]) -> Found:
    """One round of lookups without pauses."""
    return asyncio.run(lookups.find_versions(models, 0.0))


def test_few_archives_are_asked_for_one_by_one_and_many_by_one_listing(s3: S3Server, bucket: str) -> None:
    """A HEAD each, or one page of a listing with their common prefix: the versions are those that a GET has."""
    versions = fill(s3, bucket, name_models(store_lookups.FEW + 1))
    lookups = StoreLookups(open_source(f"s3://{bucket}"))
    few = name_models(3)
    assert find(lookups, few).versions == {model: versions[model] for model in few}
    assert (s3.seen("HEAD", bucket), s3.seen("GET", bucket)) == ([200] * 3, [])
    assert find(lookups, list(versions)).versions == versions
    assert (s3.seen("HEAD", bucket), s3.seen("GET", bucket)) == ([200] * 3, [200])
    assert any("prefix=au" in path for method, path, _ in s3.requests if method == "GET" and bucket in path)


def test_what_a_listing_lacks_is_asked_for(s3: S3Server, bucket: str) -> None:
    """Some stores end listings early: only an archive that is asked for in vain is removed."""
    models = name_models(store_lookups.FEW + 1)
    fill(s3, bucket, models[1:])
    found = find(StoreLookups(open_source(f"s3://{bucket}")), models)
    assert found.removed == {models[0]}
    assert found.versions.keys() == set(models[1:])
    assert s3.seen("HEAD", bucket) == [404]


def test_a_listing_that_is_not_permitted_is_not_tried_again(s3: S3Server, bucket: str) -> None:
    """Credentials that may read but not list: the archives are asked for one by one, at once and from then on."""
    models = name_models(store_lookups.FEW + 1)
    versions = fill(s3, bucket, models)
    s3.inject(Fault(match="list-type", status=403))
    lookups = StoreLookups(open_source(f"s3://{bucket}"))
    for _ in range(2):
        assert find(lookups, models).versions == versions
    assert s3.seen("GET", bucket) == [403]
    assert len(s3.seen("HEAD", bucket)) == 2 * len(models)


def test_a_listing_of_far_more_than_is_resident_is_given_up(
    s3: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once it has cost as much as asking one by one: it is not tried again before so many more are resident."""
    monkeypatch.setattr(store_lookups, "PAGE", 5)
    models = name_models(50)
    versions = fill(s3, bucket, models)
    lookups = StoreLookups(open_source(f"s3://{bucket}"))
    resident = models[::2]  # 25 of them are worth two pages of five
    found = find(lookups, resident)
    assert found.versions == {model: versions[model] for model in resident}
    assert 10 < len(s3.seen("HEAD", bucket)) < 25
    assert not lookups.prefers_listing(25)
    assert lookups.prefers_listing(30)


def test_a_store_that_is_gone_is_asked_no_more_in_this_round(s3: S3Server, bucket: str) -> None:
    """After the first failure the other archives are not asked for: at most one request of each thread, and a probe."""
    models = name_models(20)
    fill(s3, bucket, models)
    lookups = StoreLookups(open_source(f"s3://{bucket}", retries=0))
    with s3.outage(bucket):
        found = find(lookups, models)
    assert f"s3://{bucket}" in found.gone
    assert len(s3.seen("HEAD", bucket)) <= store_lookups.THREADS
    assert (found.versions, found.removed) == ({}, set())


@pytest.mark.parametrize("bad", [0, 19])
def test_a_key_that_fails_does_not_end_the_round(s3: S3Server, bucket: str, bad: int) -> None:
    """Asked for first or last, it is counted as failed; the store answers for all others, so that it is not gone."""
    models = name_models(20)
    versions = fill(s3, bucket, models)
    s3.inject(Fault(match=f"{models[bad]}", status=503))
    found = find(StoreLookups(open_source(f"s3://{bucket}", retries=0)), models)
    assert (found.gone, found.failed) == ("", {models[bad]})
    assert found.versions == {model: version for model, version in versions.items() if model != models[bad]}

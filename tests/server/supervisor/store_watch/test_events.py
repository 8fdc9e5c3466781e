"""Event notifications of S3, EventBridge, MinIO and SNS, as these send them."""

import json
from typing import Any

import pytest

from server.supervisor.store_watch.events import MOST_RECORDS, BadEvent, Changes, parse_event

STORE = "s3://models/prices"


def record(key: str, bucket: str = "models", event: str = "ObjectCreated:Put") -> dict[str, Any]:
    """A record of S3, its key URL-encoded as S3 has it; the fields that are not read are kept short."""
    s3 = {"bucket": {"name": bucket, "arn": "arn:aws:s3:::b"}, "object": {"key": key, "size": 1, "eTag": "x"}}
    return {"eventVersion": "2.1", "eventSource": "aws:s3", "eventName": event, "s3": s3}


def parse(event: object) -> Changes:
    """As it arrives."""
    return parse_event(json.dumps(event).encode(), STORE)


def test_records_of_s3_name_models_by_encoded_keys() -> None:
    """Spaces are plus signs and other characters are escaped; a name comes once."""
    event = {"Records": [record("prices/au/day+ahead%2B1.mar"), record("prices/au/day+ahead%2B1.mar")]}
    assert parse(event) == Changes(["au/day ahead+1.mar"], 0)  # type: ignore[list-item]


def test_minio_says_the_same_with_a_prefix() -> None:
    """MinIO's webhook has S3's records, and event names with `s3:`."""
    made = record("prices%2Fa.mar", event="s3:ObjectCreated:Put")
    removed = record("prices%2Fb.mar", event="s3:ObjectRemoved:Delete")
    event = {"EventName": "s3:ObjectCreated:Put", "Key": "models/prices/a.mar", "Records": [made, removed]}
    assert parse(event) == Changes(["a.mar"], 1)  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("event", "models"),
    [("ObjectCreated:CompleteMultipartUpload", 1), ("s3:ObjectCreated:Copy", 1), ("", 1), ("s3:ObjectAccessed:Get", 0),
     ("s3:ObjectAccessed:Head", 0), ("ObjectTagging:Put", 0), ("ObjectRestore:Post", 0), ("ObjectRemoved:Delete", 0),
     ("s3:Replication:OperationFailedReplication", 0), ("LifecycleExpiration:Delete", 0)],
)  # fmt: skip
def test_only_what_was_written_is_a_change(event: str, models: int) -> None:
    """MinIO tells of reads too where it is asked to: a reload that followed one would be followed by the next."""
    assert parse({"Records": [record("prices/a.mar", event=event)]}) == Changes(["a.mar"][:models], 1 - models)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "found"),
    [("Object Created", ["a+b.mar"]), ("Object Deleted", []), ("Object Access Tier Changed", []), ("", ["a+b.mar"])],
)
def test_eventbridge_has_plain_keys(kind: str, found: list[str]) -> None:
    """A plus sign is itself there."""
    detail = {"version": "0", "bucket": {"name": "models"}, "object": {"key": "prices/a+b.mar", "size": 1}}
    assert parse({"source": "aws.s3", "detail-type": kind, "detail": detail}).models == found


def test_sns_wraps_a_notification_as_text() -> None:
    """One level deep; a subscription's confirmation names no model."""
    wrapped = {"Type": "Notification", "Message": json.dumps({"Records": [record("prices/a.mar")]})}
    assert parse(wrapped) == Changes(["a.mar"], 0)  # type: ignore[list-item]
    assert parse({"Type": "SubscriptionConfirmation", "Message": "You have chosen", "SubscribeURL": "u"}).models == []
    assert parse({"Type": "Notification", "Message": json.dumps(wrapped)}).models == []


def test_what_is_not_ours_is_ignored_and_counted() -> None:
    """Another bucket, another prefix, the folder's own key, names that break a rule; S3's test message has none."""
    others = [record("prices/a.mar", "other"), record("a.mar"), record("prices/"), record("prices/a//b.mar")]
    assert parse({"Records": others}) == Changes([], 4)
    assert parse({"Service": "Amazon S3", "Event": "s3:TestEvent", "Bucket": "models"}) == Changes([], 0)
    assert parse_event(json.dumps({"Records": [record("a.mar")]}).encode(), "/a/folder").ignored == 1


@pytest.mark.parametrize(
    "body",
    [b"", b"[]", b"{", b'{"Records": 3}', b'{"Records": [{}]}', b'{"Message": "{"}', b"\xff", b"[" * 100_000,
     json.dumps({"Records": [record("a")] * (MOST_RECORDS + 1)}).encode()],
)  # fmt: skip
def test_what_is_no_notification_is_named(body: bytes) -> None:
    """Each is refused as the sender's mistake."""
    with pytest.raises(BadEvent, match="notification"):
        parse_event(body, STORE)

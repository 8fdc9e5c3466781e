"""What a store says of changed archives: event notifications of S3, EventBridge and MinIO, also wrapped by SNS. Pure.

A notification names a bucket and a key. It becomes the model's name where it is of our store and says that an object
was written; all else is ignored, since one topic may serve many buckets and folders.
"""

from collections.abc import Iterator
from typing import NamedTuple
from urllib.parse import unquote_plus, urlsplit

import msgspec
from msgspec import Struct

from model_store.archives.json_faults import FAULTS, explain_fault
from model_store.names import InvalidModelName, ModelName, parse_model_name

MAX_EVENT_BYTES = 256 * 1024  #: what SNS, SQS and EventBridge send at most
MOST_RECORDS = 1000
#: What says that an object was written. Of all else reads must be ignored: a reload is one, and would follow itself.
_WRITES = ("ObjectCreated", "s3:ObjectCreated", "Object Created")


class BadEvent(ValueError):
    """The body is no notification; the message says what is wrong."""


class Changes(NamedTuple):
    """The models that were written, and how many records were not of them."""

    models: list[ModelName]
    ignored: int


class _Bucket(Struct):
    name: str


class _Object(Struct):
    key: str


class _Place(Struct):
    bucket: _Bucket
    object: _Object


class _Record(Struct):
    s3: _Place
    event: str = msgspec.field(name="eventName", default="")


class _Notification(Struct):
    """`records` by S3 and MinIO, `detail` by EventBridge, `message` by SNS: the text of one of the others."""

    records: list[_Record] | None = msgspec.field(name="Records", default=None)
    detail: _Place | None = None
    detail_type: str = msgspec.field(name="detail-type", default="")
    message: str | None = msgspec.field(name="Message", default=None)


_DECODER = msgspec.json.Decoder(_Notification)


def parse_event(body: bytes, store: str) -> Changes:
    """The models of the store at this URL that a notification says were written. Raises BadEvent."""
    bucket, prefix = _split_store(store)
    models: dict[ModelName, None] = {}
    ignored = 0
    for event, where in _list_places(_decode(body)):
        is_ours = where.bucket.name == bucket and (not event or event.startswith(_WRITES))
        name = _read_key(where.object.key, prefix) if is_ours else None
        if name is None:
            ignored += 1
        else:
            models[name] = None
    return Changes(list(models), ignored)


def _decode(body: bytes) -> _Notification:
    try:
        found = _DECODER.decode(body)
        if found.message is not None and found.records is None and found.detail is None:
            found = _DECODER.decode(found.message) if found.message.lstrip().startswith("{") else _Notification()
    except FAULTS as error:
        raise BadEvent(f"not an event notification of S3, EventBridge, MinIO or SNS: {explain_fault(error)}") from None
    if len(found.records or ()) > MOST_RECORDS:
        raise BadEvent(f"a notification has at most {MOST_RECORDS} records, not {len(found.records or ())}")
    return found


def _list_places(found: _Notification) -> Iterator[tuple[str, _Place]]:
    """What happened and where. In records keys are URL-encoded, in EventBridge's details they are not."""
    for record in found.records or ():
        key = unquote_plus(record.s3.object.key)
        yield record.event, _Place(record.s3.bucket, _Object(key))
    if found.detail is not None:
        yield found.detail_type, found.detail


def _split_store(store: str) -> tuple[str, str]:
    """Bucket and prefix, with its last slash, of a store's URL. A folder has no bucket, so no event is its."""
    parts = urlsplit(store)
    prefix = "/".join(part for part in parts.path.split("/") if part)
    return parts.netloc, f"{prefix}/" if prefix else ""


def _read_key(key: str, prefix: str) -> ModelName | None:
    if not key.startswith(prefix):
        return None
    try:
        return parse_model_name(key.removeprefix(prefix))
    except InvalidModelName:
        return None

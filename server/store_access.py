"""The stores that the settings name: that of the archives, and the bucket of asynchronous answers.

Workers load archives, the supervisor watches them, and fronts write answers.
"""

from model_store.names import ModelName
from model_store.stores.object_store import Source, open_source, open_unpacked_source
from server.sagemaker_container.environment import ONLY_MODEL, SINGLE_MODEL
from server.settings import Settings


def open_settings_store(settings: Settings) -> Source:
    """No request is sent. Takes a third of a second for s3://. Raises InvalidStoreUrl, StoreDenied."""
    if settings.container != "off":
        alone = ModelName(ONLY_MODEL) if settings.container == SINGLE_MODEL else None
        limit = int(settings.max_archive_bytes)
        return open_unpacked_source(settings.store, alone=alone, max_archive_bytes=limit)
    return _open(settings, settings.store, int(settings.max_archive_bytes))


def open_output_store(settings: Settings) -> Source:
    """The bucket of asynchronous answers, as above; objects of up to `max_body_bytes` are read."""
    return _open(settings, settings.async_output, int(settings.max_body_bytes))


def _open(settings: Settings, url: str, largest: int) -> Source:
    return open_source(
        url,
        timeout_s=settings.store_timeout_s,
        retries=settings.store_retries,
        profile=settings.s3_profile,
        endpoint_url=settings.s3_endpoint_url,
        region=settings.s3_region,
        max_archive_bytes=largest,
    )

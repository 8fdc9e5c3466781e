"""The store that the settings name. Workers load from it, the supervisor watches it."""

from model_store.names import ModelName
from model_store.stores.object_store import Source, open_source, open_unpacked_source
from server.sagemaker_environment import ONLY_MODEL, SINGLE_MODEL
from server.settings import Settings


def open_settings_store(settings: Settings) -> Source:
    """No request is sent. Takes a third of a second for s3://. Raises InvalidStoreUrl, StoreDenied."""
    if settings.container != "off":
        alone = ModelName(ONLY_MODEL) if settings.container == SINGLE_MODEL else None
        limit = int(settings.max_archive_bytes)
        return open_unpacked_source(settings.store, alone=alone, max_archive_bytes=limit)
    return open_source(
        settings.store,
        timeout_s=settings.store_timeout_s,
        retries=settings.store_retries,
        profile=settings.s3_profile,
        endpoint_url=settings.s3_endpoint_url,
        region=settings.s3_region,
        max_archive_bytes=int(settings.max_archive_bytes),
    )

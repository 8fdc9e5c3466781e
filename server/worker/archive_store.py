"""Opens the store of the settings, with the limits of what it may give. No torch: tools read archives by it as well."""

from model_store.archives.archive import Limits
from model_store.stores.object_store import Source
from server.settings import Settings
from server.store_access import open_settings_store


def open_store(settings: Settings) -> tuple[Source, Limits]:
    """The settings' store and the limits of what it may give. Raises InvalidStoreUrl, StoreDenied."""
    limits = Limits(
        max_archive_bytes=int(settings.max_archive_bytes), max_unpacked_bytes=int(settings.max_unpacked_bytes)
    )
    return open_settings_store(settings), limits

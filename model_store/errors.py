"""What can go wrong between a model name and a verified archive: one class per situation.

`reason` is a short stable slug: the label of `fleetcast_model_load_failures_total` and the key of the table that maps
situations to protocol codes (`server/errors.py`).
"""

from typing import ClassVar


class LoadError(Exception):
    """A model could not be made ready. The message says what was wrong, where, and what to do."""

    reason: ClassVar[str] = "load_failed"
    #: Seconds for which the failure is remembered: the first time, and at most, doubling with every repetition.
    back_off_s: ClassVar[float] = 1.0
    max_back_off_s: ClassVar[float] = 32.0


class ModelNotFound(LoadError):
    """The store has no object under this key. Remembered for at most a second: a new archive is served at once."""

    reason = "not_found"
    back_off_s = 0.5
    max_back_off_s = 1.0


class StoreDenied(LoadError):
    """The store refuses our credentials, or hides a missing key behind 403 (no list permission)."""

    reason = "store_denied"


class StoreUnavailable(LoadError):
    """The store cannot be reached, or fails after the retries."""

    reason = "store_unavailable"


class ArchiveInvalid(LoadError):
    """The archive breaks a rule: not an archive, truncated, hostile paths, wrong manifest, hash, tensors or golden."""

    reason = "archive_invalid"


class ArchiveTooLarge(ArchiveInvalid):
    """The archive breaks a size rule: bytes, entries or compression ratio."""

    reason = "archive_too_large"


class UnsupportedKind(LoadError):
    """The archive is sound but of a kind this server does not run; the message says what will."""

    reason = "unsupported_kind"


class GoldenMismatch(ArchiveInvalid):
    """The archive's own golden sample is not reproduced."""

    reason = "golden_mismatch"


class NoRoom(LoadError):
    """The model is sound, but no patience would find room for it: larger than the budget, or pins fill it."""

    reason = "no_room"

"""Errors of loading a model, from its name to a verified archive: one class per situation.

`reason` is a short stable slug: the label of `fleetcast_model_load_failures_total`, and the key by which
`server/errors.py` maps a situation to protocol codes.
"""

from typing import ClassVar


class LoadError(Exception):
    """A model could not be made ready. The message says what was wrong, where, and what to do.

    `public` is the message as clients see it: without the store's path, address and inner errors. Logs have the other.
    """

    reason: ClassVar[str] = "load_failed"
    #: Seconds for which the failure is remembered: at first, and at most. The time doubles with each repetition.
    back_off_s: ClassVar[float] = 1.0
    max_back_off_s: ClassVar[float] = 32.0

    def __init__(self, message: str, public: str | None = None) -> None:
        super().__init__(message)
        self.public = message if public is None else public


class ModelNotFound(LoadError):
    """The store has no object under this key. Remembered for at most a second: a new archive is served at once."""

    reason = "not_found"
    back_off_s = 0.5
    max_back_off_s = 1.0


class StoreDenied(LoadError):
    """The store refuses the credentials, or answers 403 for a missing key because it may not be listed."""

    reason = "store_denied"


class StoreUnavailable(LoadError):
    """The store cannot be reached, or fails after the retries. Remembered for at most two seconds: it may be back."""

    reason = "store_unavailable"
    max_back_off_s = 2.0


class StoreOut(StoreUnavailable):
    """The store answers nothing at present, so that it was not asked. Remembered for a second: it may be back then."""

    max_back_off_s = 1.0


class ArchiveInvalid(LoadError):
    """The archive breaks a rule of the format: container, paths, manifest, hash, tensors or golden sample."""

    reason = "archive_invalid"


class ArchiveTooLarge(ArchiveInvalid):
    """The archive breaks a limit of size: bytes, entries, records or compression ratio."""

    reason = "archive_too_large"


class UnsupportedKind(LoadError):
    """The archive is valid, but this server does not run its kind; the message says what does."""

    reason = "unsupported_kind"


class CodeFailed(LoadError):
    """The code of an archive could not be loaded: it raised, took too long, or its process ended."""

    reason = "code_failed"


class CodeNoMemory(CodeFailed):
    """The code of an archive needs more memory to load than one archive may take."""

    reason = "code_no_memory"


class CodeBusy(LoadError):
    """So many code archives are being loaded that no further one is begun. Remembered for at most a second."""

    reason = "code_busy"
    back_off_s = 0.25
    max_back_off_s = 1.0


class GoldenMismatch(ArchiveInvalid):
    """The model does not reproduce the archive's golden sample."""

    reason = "golden_mismatch"


class NoRoom(LoadError):
    """The model is valid, but waiting cannot give it memory: it exceeds the budget, or pins fill the budget."""

    reason = "no_room"

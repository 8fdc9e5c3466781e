"""Why something cannot be registered, scaled or removed: one class a situation. Dialects say it in their own words."""

from model_store.names import MAX_SHOWN


class RegistrationRefused(Exception):
    """Base of all. Nothing is changed where one is raised; the text is advice for people."""


class ModelUnknown(RegistrationRefused):
    """No model is registered under this name."""

    def __init__(self, name: str) -> None:
        super().__init__(f"no model is registered as {shorten_name(name)}")
        self.name = name


class VersionUnknown(RegistrationRefused):
    """The model is registered, but not with this version."""

    def __init__(self, name: str, version: str) -> None:
        super().__init__(f"the model {shorten_name(name)} has no version {shorten_name(version)}")
        self.name, self.version = name, version


class AlreadyRegistered(RegistrationRefused):
    """The model has this version already."""

    def __init__(self, name: str, version: str) -> None:
        super().__init__(f"the model {shorten_name(name)} has a version {version} already")
        self.name, self.version = name, version


class DefaultVersionStays(RegistrationRefused):
    """The default version can only be removed together with the others."""

    def __init__(self, name: str) -> None:
        super().__init__(f"another version of {shorten_name(name)} has to be the default one first")
        self.name = name


class NotInStore(RegistrationRefused):
    """The store has no such archive, or the URL is none of its."""

    def __init__(self, url: str, why: str) -> None:
        super().__init__(why)
        self.url = url


class UrlOutsideStore(NotInStore):
    """A URL of another place. INVARIANT: nothing is fetched from anywhere but the store."""


class ArchiveUnreadable(RegistrationRefused):
    """The store has the archive, but it cannot be read now, or at all. `situation`: see NotLoaded."""

    def __init__(self, message: str, situation: int) -> None:
        super().__init__(message)
        self.situation = situation


class BadOption(RegistrationRefused):
    """A parameter that cannot be; the message names it."""


class TableFull(RegistrationRefused):
    """No further name or version has room."""


class NotLoaded(RegistrationRefused):
    """The model could not be loaded. `situation` is a `server.errors.Situation` number."""

    def __init__(self, message: str, situation: int) -> None:
        super().__init__(message)
        self.situation = situation


def shorten_name(name: str) -> str:
    """A name for a message."""
    return name if len(name) <= MAX_SHOWN else f"{name[:MAX_SHOWN]}..."

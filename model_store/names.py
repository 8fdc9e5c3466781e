"""Names in stores and archives. Pure.

A model's name is its archive's key under the store's prefix; it is checked before any request.
"""

from collections.abc import Sequence
from typing import NewType, cast

ModelName = NewType("ModelName", str)
MAX_NAME = 1024
MAX_VERSION = 256
VERSION_MARK = "\\"  # between name and version
MAX_SHOWN = 80  # characters of a name in a message
_APPLE_DOUBLE = "._"  # before the name of the file whose Finder data it holds
_LEFT_FILES = frozenset({".ds_store", "__macosx", "thumbs.db", "desktop.ini"})


class InvalidModelName(ValueError):
    """The text cannot name a model; the message says which rule it breaks."""


def parse_model_name(raw: str) -> ModelName:
    """A model name such as `au/nsw1/energy.mar`.

    Rules (CONTRACTS, model name): 1-1024 printable characters, no empty, `.` or `..` segment, no leading slash, no
    backslash, no control character.

    Raises:
        InvalidModelName: one rule is broken; the message names it and quotes the name (shortened).
    """
    if not raw:
        raise InvalidModelName("the model name is empty")
    if len(raw) > MAX_NAME:
        raise InvalidModelName(f"the model name has {len(raw)} characters, more than {MAX_NAME}")
    shown = raw if len(raw) <= MAX_SHOWN else raw[:MAX_SHOWN] + "..."
    if not raw.isprintable():
        raise InvalidModelName(f"the model name {shown!r} has a control or unprintable character")
    if "\\" in raw:
        raise InvalidModelName(f"the model name {shown!r} has a backslash")
    for segment in raw.split("/"):
        if segment in ("", ".", ".."):
            what = f"the segment {segment!r}" if segment else "an empty segment or a leading or trailing slash"
            raise InvalidModelName(f"the model name {shown!r} has {what}")
    return ModelName(raw)


def parse_model_names(raws: Sequence[str | None]) -> list[ModelName] | None:
    """As many model names, by a few looks at all of them; None where one is missing or breaks a rule."""
    if not raws or None in raws or "" in raws:
        return None if raws else []
    names = cast("Sequence[str]", raws)
    joined = f"/{'/'.join(names)}/"
    is_broken = not joined.isprintable() or any(each in joined for each in ("\\", "//", "/./", "/../"))
    if is_broken or max(map(len, names), default=0) > MAX_NAME:
        return None
    return [ModelName(each) for each in names]


def at_version(name: ModelName, version: str) -> ModelName:
    """What a model is called inside the server where it is asked for at a version. No archive and no client's name can
    be the same, since these have no backslash.
    """
    return ModelName(f"{name}{VERSION_MARK}{version}")


def split_version(name: ModelName) -> tuple[ModelName, str]:
    """The archive's name, and the version that `at_version` has added; empty where it has not."""
    archive, _, version = name.partition(VERSION_MARK)
    return ModelName(archive), version


def parse_versioned_name(raw: str) -> ModelName:
    """A model name as `parse_model_name` has it, or one that `at_version` has made. Raises InvalidModelName."""
    name, mark, version = raw.partition(VERSION_MARK)
    if not mark:
        return parse_model_name(raw)
    return at_version(parse_model_name(name), parse_version(version))


def parse_version(raw: str) -> str:
    """A version as stores give it, such as an ETag. Raises InvalidModelName."""
    if not 1 <= len(raw) <= MAX_VERSION or not raw.isprintable() or VERSION_MARK in raw:
        shown = raw if len(raw) <= MAX_SHOWN else raw[:MAX_SHOWN] + "..."
        raise InvalidModelName(f"{shown!r} is no version: 1 to {MAX_VERSION} printable characters without a backslash")
    return raw


def is_left_by_desktop(path: str) -> bool:
    """Whether the file is one that macOS or Windows leaves in folders and puts into archives, never a user's own."""
    return any(part.startswith(_APPLE_DOUBLE) or part.casefold() in _LEFT_FILES for part in path.split("/"))

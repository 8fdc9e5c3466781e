"""Access keys of a TOML file: a line `KEY = "SECRET"` each. Their secrets are in no message and no `repr`."""

import os
import stat
from pathlib import Path

import msgspec
import structlog
from pydantic import SecretStr

MAX_FILE_BYTES = 1024 * 1024

log = structlog.get_logger()


def read_access_keys(path: Path) -> dict[str, SecretStr]:
    """Access key -> secret. Raises ValueError that names the file, and what is wrong with it.

    A file that other users can write to is refused. One that they can read is a warning, because that is how
    Kubernetes mounts secrets.
    """
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            raw = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ValueError(f"the keys' file {path} cannot be read: {error.strerror} (access_keys_file)") from error
    if mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ValueError(f"the keys' file {path} can be written by others: chmod go-w {path} (access_keys_file)")
    if mode & stat.S_IROTH:
        log.warning("secrets_readable", file=str(path), why=f"every user of this host can read it: chmod o-r {path}")
    if len(raw) > MAX_FILE_BYTES:
        raise ValueError(f"the keys' file {path} has more than {MAX_FILE_BYTES} bytes (access_keys_file)")
    try:
        found = msgspec.toml.decode(raw, type=dict[str, str])
    except (msgspec.MsgspecError, UnicodeDecodeError):  # whose text could repeat a part of the file
        found = {}
    if not found or not all(found.values()):
        raise ValueError(f'the keys\' file {path} must be TOML with lines KEY = "SECRET" (access_keys_file)') from None
    return {key: SecretStr(secret) for key, secret in found.items()}

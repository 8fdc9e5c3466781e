"""Access keys of a TOML file: a line `KEY = "SECRET"` each. Their secrets are in no message and no `repr`."""

import stat
from pathlib import Path

import msgspec
import structlog
from pydantic import SecretStr

from server.access.secret_files import read_secret_file

log = structlog.get_logger()


def read_access_keys(path: Path) -> dict[str, SecretStr]:
    """Access key -> secret. Raises ValueError that names the file, and what is wrong with it.

    A file that other users can write to is refused. One that they can read is a warning, because that is how
    Kubernetes mounts secrets.
    """
    status, raw = read_secret_file(path, "the keys' file", "access_keys_file")
    if status.st_mode & stat.S_IROTH:
        log.warning("secrets_readable", file=str(path), why=f"every user of this host can read it: chmod o-r {path}")
    try:
        found = msgspec.toml.decode(raw, type=dict[str, str])
    except (msgspec.MsgspecError, UnicodeDecodeError):  # whose text could repeat a part of the file
        found = {}
    if not found or not all(found.values()):
        raise ValueError(f'the keys\' file {path} must be TOML with lines KEY = "SECRET" (access_keys_file)') from None
    return {key: SecretStr(secret) for key, secret in found.items()}

"""Installs what an archive's `requirements.txt` names into its own folder, where the operator allows it.

INVARIANT: nothing of the archive or of the packages runs while they are installed: only wheels are taken, and a line of
the file is a package's name with versions, never an option, a path or an address. Packages that the server has are
held at their versions: what asks for others is refused. On a thread of the code lane.
"""

import contextlib
import importlib.metadata
import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from model_store.errors import CodeFailed, UnsupportedKind
from model_store.names import ModelName

PACKAGES = "packages"  #: the folder, beside the archive's own
MAX_LINES, MAX_BYTES = 200, 64 * 1024  #: of a file of requirements
MAX_SAID = 600  #: characters of pip's last words in an error
MAX_FILE = 1024 * 1024 * 1024  #: bytes of a file that is downloaded or unpacked
_REQUIREMENT = re.compile(
    r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}(\[[A-Za-z0-9._, -]*\])?\s*(\(?[<>=!~][<>=!~,. A-Za-z0-9*+-]*\)?)?\s*(;[^@/\\]*)?"
)
#: What pip may know of the server's environment: how to reach an index, and no credentials but the index's own.
KEPT = ("PATH", "LANG", "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")


def read_requirements(model: ModelName, data: bytes) -> list[str]:
    """The lines of a file of requirements. Raises UnsupportedKind for what is more than names and versions."""
    lines = [line.partition("#")[0].strip() for line in data[: MAX_BYTES + 1].decode(errors="replace").splitlines()]
    found = [line for line in lines if line]
    if len(data) > MAX_BYTES or len(found) > MAX_LINES:
        raise UnsupportedKind(
            f"{model}: requirements.txt has more than {MAX_LINES} lines or {MAX_BYTES} bytes: install the packages "
            "beside the server, and pack the archive without it"
        )
    for line in found:
        if _REQUIREMENT.fullmatch(line) is None:
            raise UnsupportedKind(
                f"{model}: requirements.txt: {line[:80]!r} is not a package's name with versions; options, paths and "
                "addresses are not taken: install it beside the server, and pack the archive without it"
            )
    return found


def install(model: ModelName, requirements: list[str], folder: Path, timeout_s: float) -> Path | None:
    """Install them below `folder`; where Python finds them then. Raises CodeFailed."""
    place, listed, held = folder / PACKAGES, folder / "tmp" / "requirements.txt", folder / "tmp" / "constraints.txt"
    listed.write_text("\n".join(requirements))
    held.write_text("\n".join(_list_installed()))
    command = [
        sys.executable, "-I", "-m", "pip", "install", "--prefix", str(place), "--only-binary", ":all:", "--no-input",
        "--no-cache-dir", "--disable-pip-version-check", "--quiet", "-c", str(held), "-r", str(listed),
    ]  # fmt: skip
    kept = {
        name: value for name, value in os.environ.items() if name.upper() in KEPT or name.upper().startswith("PIP_")
    }
    env = kept | {"HOME": str(folder), "TMPDIR": str(folder / "tmp")}
    with subprocess.Popen(  # noqa: S603 -- our own interpreter, and files that were checked
        command, env=env, cwd=folder, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        start_new_session=True,
    ) as pip:  # fmt: skip
        with contextlib.suppress(ProcessLookupError, PermissionError):
            resource.prlimit(pip.pid, resource.RLIMIT_FSIZE, (MAX_FILE, MAX_FILE))
        try:
            said, _ = pip.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            os.killpg(pip.pid, signal.SIGKILL)
            raise CodeFailed(
                f"{model}: the packages of requirements.txt were not installed within {timeout_s:g} s (code_install_s)"
            ) from None
    if pip.returncode:
        words = said.decode(errors="replace").strip()[-MAX_SAID:]
        raise CodeFailed(f"{model}: the packages of requirements.txt could not be installed: {words}")
    return next((path for name in ("site-packages", "dist-packages") for path in place.rglob(name)), None)


def _list_installed() -> Iterator[str]:
    """What the server has, as constraints: pip would remove another version of it, for all."""
    for found in importlib.metadata.distributions():
        name, version = found.metadata["Name"], found.version
        if name and version and _REQUIREMENT.fullmatch(f"{name}=={version}"):
            yield f"{name}=={version}"

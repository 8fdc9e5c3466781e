"""A virtual environment for each peer: made once with pip from its pinned requirements, and kept."""

import hashlib
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).parent
ROOT = Path(".fleetcast/peers")
INSTALL_S = 1800.0
PIN = re.compile(r"([\w.-]+)==(\d[\w.+!]*)")
DONE = "installed"  #: a file that only a finished environment has


class PeerUnavailable(Exception):
    """A peer that cannot be installed, started or asked here; the message says why and what to do."""


def find_requirements(peer: str) -> Path:
    """Return the file of the pinned requirements of a peer."""
    return HERE / peer / "requirements.txt"


def parse_pins(text: str) -> dict[str, str]:
    """Parse a requirements file into package -> version. Raises ValueError for a line other than `package==version`."""
    found = {}
    for line in text.splitlines():
        if not line or line.startswith("#"):
            continue
        pin = PIN.fullmatch(line)
        if pin is None:
            raise ValueError(f"{line!r} does not pin one version exactly: write package==version")
        found[pin[1]] = pin[2]
    return found


def is_installed(peer: str, root: Path = ROOT) -> bool:
    """Return whether the environment of the peer is installed with its present requirements."""
    return (_locate_environment(peer, root) / DONE).exists()


def make_environment(peer: str, say: Callable[[str], None], root: Path = ROOT) -> Path:
    """Return the environment folder of a peer; it is installed if missing, and replaces an older one.

    Raises PeerUnavailable if pip fails.
    """
    folder = _locate_environment(peer, root)
    if is_installed(peer, root):
        return folder
    count = len(parse_pins(find_requirements(peer).read_text()))
    say(f"{peer}: installing {count} packages (about 1 GB with torch) ...")
    started = time.monotonic()
    python = str(folder / "bin" / "python")
    _run_step([sys.executable, "-m", "venv", "--clear", str(folder)], peer)
    _run_step([python, "-m", "pip", "install", "--quiet", "--requirement", str(find_requirements(peer))], peer)
    (folder / DONE).touch()
    for older in set(root.absolute().glob(f"{peer}-*")) - {folder}:
        shutil.rmtree(older)
    say(f"{peer}: installed in {time.monotonic() - started:.0f} s")
    return folder


def _locate_environment(peer: str, root: Path) -> Path:
    """Name the environment by its contents: other requirements or another Python give another name."""
    key = hashlib.sha256(f"{sys.version_info[:2]}{find_requirements(peer).read_text()}".encode()).hexdigest()[:12]
    return (root / f"{peer}-{key}").absolute()


def _run_step(command: list[str], peer: str) -> None:
    """Run one step of an installation; the error has the end of its output."""
    try:
        subprocess.run(command, capture_output=True, text=True, check=True, timeout=INSTALL_S)
    except subprocess.TimeoutExpired:
        raise PeerUnavailable(f"{peer}: pip did not finish within {INSTALL_S:g} s; run it again") from None
    except subprocess.CalledProcessError as error:
        words = [line for line in error.stderr.splitlines() if line.strip() and not line.startswith("WARNING")]
        raise PeerUnavailable(f"{peer}: cannot be installed: {' '.join(words[-2:])[:300]}") from None

"""Closed-loop load by wrk on one address: many models in turn, one body. wrk is a separate process."""

import json
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from loadtest.driver.dialects import DIALECTS, ClientDialect

SCRIPT = Path(__file__).with_name("round_robin.lua")


@dataclass(frozen=True, slots=True)
class WrkResult:
    """The result of one run. `errors` counts failed connections, time-outs and statuses other than 2xx and 3xx."""

    requests_per_s: float
    p50_ms: float
    p99_ms: float
    errors: int


@dataclass(frozen=True, slots=True)
class WrkTarget:
    """A server that answers POST for the models m0{suffix} ... m{count - 1}{suffix}; only the host of `url` is used."""

    name: str
    url: str
    count: int
    suffix: str
    body: Path
    content_type: str
    dialect: ClientDialect = DIALECTS["sagemaker"]  #: the protocol, which places the model's name
    headers: Mapping[str, str] = field(default_factory=dict)  #: of the body, besides those of the protocol


def require_wrk() -> None:
    """Check that wrk is installed. Raises SystemExit that says how to install it."""
    if shutil.which("wrk") is None:
        raise SystemExit("wrk is not installed; on Debian: apt-get install wrk")


def run_wrk(target: WrkTarget, connections: int, seconds: float) -> WrkResult:
    """Run wrk for so many whole seconds. Raises RuntimeError if any request failed, because errors may be fast."""
    command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds:g}s", "-s", str(SCRIPT), target.url, "--"]
    command += [str(target.body), str(target.count), target.suffix, target.content_type, target.dialect.path]
    command += [part for header in {**target.dialect.headers, **target.headers}.items() for part in header]
    # It has a session of its own, because Linux shares processors out by session, and servers differ in whose they are.
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=seconds + 60, start_new_session=True
    )
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))
    found = json.loads(line.removeprefix("RESULT "))
    if found["errors"]:
        raise RuntimeError(f"{target.name}: {found['errors']} of {found['requests']} requests failed")
    return WrkResult(found["requests"] / found["seconds"], found["p50_ms"], found["p99_ms"], found["errors"])

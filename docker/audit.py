"""Asks pip-audit whether the images' locks name releases with known vulnerabilities: `make audit`. Needs no package.

Where the advisory service cannot be reached, or does not know a release, the lock is not known to be clean: that fails
unless --warn-unreachable is given, which is for machines without a network. Vulnerabilities always fail, except those
that audit-ignored.toml names with a reason and the date until which it holds.
"""

import argparse
import datetime as dt
import json
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
KEYS = {"id", "reason", "until"}
SHOWN = 5


def main() -> None:
    """Exits with 1 for a known vulnerability or a wrong file, 2 where not everything could be looked up."""
    parser = argparse.ArgumentParser(description="look up the images' packages in an advisory database")
    parser.add_argument("pip_audit", type=Path, help="the program pip-audit")
    parser.add_argument("--lock", type=Path, action="append", help="lock file; default those of docker/")
    parser.add_argument("--ignored", type=Path, default=HERE / "audit-ignored.toml", help="accepted vulnerabilities")
    parser.add_argument("--service", default="pypi", help="pip-audit's --vulnerability-service")
    parser.add_argument("--osv-url", help="pip-audit's --osv-url, with --service osv")
    parser.add_argument("--warn-unreachable", action="store_true", help="only warn about what cannot be looked up")
    flags = parser.parse_args()
    locks = flags.lock or sorted(HERE.glob("*.lock"))
    try:
        ignored = read_ignored(flags.ignored.read_text(), dt.datetime.now(tz=dt.UTC).date())
    except (ValueError, OSError) as error:
        sys.exit(f"{flags.ignored}: {error}")
    service = ["--vulnerability-service", flags.service, *(["--osv-url", flags.osv_url] if flags.osv_url else [])]
    report, said = run_pip_audit(flags.pip_audit, locks, service)
    vulnerable, unknown = read_report(report, ignored)
    for line in vulnerable:
        print(line)
    if report is None:
        unknown = [said]
    if unknown:
        more = f" and {len(unknown) - SHOWN} more" if len(unknown) > SHOWN else ""
        print(f"warning: not looked up: {'; '.join(unknown[:SHOWN])}{more}", file=sys.stderr)
    if vulnerable:
        sys.exit(
            f"known vulnerabilities: raise the release (make lock ARGS=--upgrade), or say why not in {flags.ignored}"
        )
    if unknown and not flags.warn_unreachable:
        sys.exit(2)
    if not unknown:
        print(f"no known vulnerabilities in {', '.join(lock.name for lock in locks)}")


def read_ignored(text: str, today: dt.date) -> frozenset[str]:
    """The ids of advisories that are accepted today. Raises ValueError for an entry that is not whole."""
    found = set()
    for entry in tomllib.loads(text).get("ignored", []):
        if set(entry) != KEYS or type(entry["until"]) is not dt.date or not str(entry["reason"]).strip():
            raise ValueError(f"an entry needs id, reason and until (a date), not {entry}")
        if today <= entry["until"]:
            found.add(entry["id"])
    return frozenset(found)


def run_pip_audit(program: Path, locks: Sequence[Path], service: Sequence[str]) -> tuple[Any, str]:
    """Pip-audit's report, or None and what it said instead.

    Builds of a release (`2.13.0+cpu`) are looked up as the release: advisories do not name builds.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [str(program), "--format", "json", "--progress-spinner", "off", "--require-hashes", "--disable-pip"]
        for lock in locks:
            plain = Path(folder, lock.name)
            plain.write_text(re.sub(r"^([\w.-]+==[^\s+]+)\+[\w.]+", r"\1", lock.read_text(), flags=re.MULTILINE))
            command += ["--requirement", str(plain)]
        done = subprocess.run([*command, *service], capture_output=True, text=True, check=False)
    try:
        return json.loads(done.stdout), ""
    except ValueError:
        lines = done.stderr.strip().splitlines()
        return None, f"pip-audit ended with {done.returncode}: {lines[-1][:300] if lines else 'it said nothing'}"


def read_report(report: Any, ignored: frozenset[str]) -> tuple[list[str], list[str]]:
    """A line for each vulnerability that is not accepted, and the packages that were not looked up."""
    vulnerable, unknown = [], []
    for each in report["dependencies"] if report else ():
        if "skip_reason" in each:
            unknown.append(each["name"])
        for found in each.get("vulns", ()):
            if not ignored & {found["id"], *found.get("aliases", ())}:
                fixed = ", ".join(found.get("fix_versions", ())) or "no release"
                vulnerable.append(f"{each['name']} {each['version']}: {found['id']}, fixed in {fixed}")
    return vulnerable, unknown


if __name__ == "__main__":
    main()

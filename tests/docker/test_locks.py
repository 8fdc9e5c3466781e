"""The images' locks: whole, hashed and within pyproject's ranges; and the audit of them, against a local service."""

import datetime as dt
import hashlib
import importlib.metadata
import importlib.util
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from loadtest.observe.processes import find_free_port
from tests.http_servers import serve_on_thread
from tests.patience import PATIENCE_S

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
#: Lock -> the extras that its image installs.
LOCKS = {"requirements.lock": ("cpu", "load"), "requirements-cuda.lock": ("cuda", "load")}
PIP_AUDIT = ROOT / ".tools" / "bin" / "pip-audit"
TARGET = {"python_version": "3.11", "sys_platform": "linux", "platform_machine": "x86_64", "extra": ""}
CLEAN: Mapping[str, Any] = {"vulns": []}
FAULT = {"id": "GHSA-aaaa-bbbb-cccc", "aliases": ["CVE-2026-1"], "fix_versions": ["2.1"], "description": "..."}


def read_lock(name: str) -> dict[str, tuple[Requirement, list[str]]]:
    """Package -> its line's requirement and hashes."""
    text = re.sub(r"\s*\\\n\s*", " ", re.sub(r"^\s*#.*\n", "", (DOCKER / name).read_text(), flags=re.MULTILINE))
    found: dict[str, tuple[Requirement, list[str]]] = {}
    for line in text.splitlines():
        requirement, *hashes = line.split(" --hash=")
        parsed = Requirement(requirement)
        assert canonicalize_name(parsed.name) not in found, line
        found[canonicalize_name(parsed.name)] = parsed, hashes
    return found


def read_pin(requirement: Requirement) -> Version:
    """The one version that a line of a lock admits."""
    (only,) = requirement.specifier
    assert only.operator == "==", requirement
    return Version(only.version)


def list_needs(extras: tuple[str, ...]) -> list[Requirement]:
    """What pyproject.toml asks for, and what builds the project."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    lines = [*project["project"]["dependencies"], *project["build-system"]["requires"]]
    for extra in extras:
        lines += project["project"]["optional-dependencies"][extra]
    return [Requirement(line) for line in lines]


@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_satisfies_every_range_of_the_project(name: str) -> None:
    """Each dependency of the image is locked to a version that pyproject.toml admits: else `make lock` is due."""
    lock = read_lock(name)
    needs = [need for need in list_needs(LOCKS[name]) if need.marker is None or need.marker.evaluate(TARGET)]
    assert len(needs) > 15
    for need in needs:
        assert canonicalize_name(need.name) in lock, f"{need} is not in {name}: make lock"
        assert need.specifier.contains(read_pin(lock[canonicalize_name(need.name)][0])), f"{need}: make lock"


@pytest.mark.parametrize("name", LOCKS)
def test_every_line_has_one_version_and_hashes(name: str) -> None:
    """No range, no address, no file of this machine: one version and SHA-256 hashes."""
    for package, (requirement, hashes) in read_lock(name).items():
        assert read_pin(requirement)
        assert requirement.url is None
        assert hashes, package
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", each) for each in hashes), package


def test_the_cpu_image_has_no_cuda_libraries_and_both_have_the_same_torch() -> None:
    """Torch is that of the Makefile, with which the tests run."""
    cpu, cuda = (read_lock(name) for name in LOCKS)
    assert not [package for package in cpu if package.startswith(("nvidia-", "cuda-", "triton"))]
    assert [package for package in cuda if package.startswith("nvidia-")]
    tested = re.search(r"^TORCH = torch==(\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert tested is not None
    assert [str(read_pin(lock["torch"][0])) for lock in (cpu, cuda)] == [f"{tested[1]}+cpu", tested[1]]


def test_the_cuda_extra_admits_wheels_of_one_cuda_only() -> None:
    """A process loads the libraries of one CUDA. Torch is built for CUDA 13 since 2.11, onnxruntime-gpu since 1.27; the
    lock has one set of them.
    """
    needs = {need.name: need.specifier for need in list_needs(("cuda",))}
    assert not needs["onnxruntime-gpu"].contains("1.26.0"), "built for CUDA 12"
    assert not needs["torch"].contains("2.10.0"), "built for CUDA 12"
    libraries = [package for package in read_lock("requirements-cuda.lock") if re.search(r"-cu\d+$", package)]
    assert {package.rpartition("-cu")[2] for package in libraries} == {"13"}


@pytest.mark.parametrize("path", sorted(DOCKER.glob("*.Dockerfile")), ids=lambda path: path.name)
def test_images_install_nothing_but_the_lock(path: Path) -> None:
    """Every `pip install` is of a lock with hashes, or of the project alone, and no base is without a digest."""
    text = path.read_text().replace("\\\n", " ")
    installs = re.findall(r"pip install(.*)", text)
    assert len(installs) == 2
    assert "--require-hashes" in installs[0]
    assert re.search(r"-r docker/\S+\.lock$", installs[0])
    assert re.search(r"--no-index --no-deps --no-build-isolation \.$", installs[1])
    stages = set(re.findall(r"^FROM .* AS (\S+)", text, re.MULTILINE))
    bases = [base for base in re.findall(r"^FROM (\S+)", text, re.MULTILINE) if base not in stages]
    assert bases
    assert all(re.fullmatch(r"[\w./-]+:[\w.-]+@sha256:[0-9a-f]{64}", base) for base in bases)
    assert "!docker/*.lock" in (ROOT / ".dockerignore").read_text().splitlines()


@pytest.mark.slow
def test_the_cpu_image_says_its_size() -> None:
    """As far as it is known here: by the locked packages here, but for torch, of which there may be any build."""
    said = (DOCKER / "cpu.Dockerfile").read_text()
    sizes = {name: float(size) for name, size in re.findall(r"(packages are|torch|ONNX Runtime|numpy) (\d\.\d+)", said)}
    found = {name: measure_installed(name) for name in read_lock("requirements.lock") if name != "torch"}
    assert sum(found.values()) / 1e9 == pytest.approx(sizes["packages are"] - sizes["torch"], rel=0.2)
    assert found["numpy"] / 1e9 == pytest.approx(sizes["numpy"], rel=0.3)


def measure_installed(name: str) -> int:
    """The bytes of an installed package, without what Python compiles of it; 0 where it is not installed."""
    try:
        files = importlib.metadata.distribution(name).files or []
    except importlib.metadata.PackageNotFoundError:
        return 0
    found = (Path(str(file.locate())) for file in files if file.suffix != ".pyc")
    return sum(file.stat().st_size for file in found if file.is_file())


# --- the audit ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def audit() -> ModuleType:
    """The program docker/audit.py as a module."""
    spec = importlib.util.spec_from_file_location("audit", DOCKER / "audit.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_report_has_vulnerabilities_and_what_was_not_looked_up(audit: ModuleType) -> None:
    """Accepted ones are left out, by their id or by another name of theirs; what was skipped is not taken for clean."""
    report = {
        "dependencies": [
            {"name": "sound", "version": "1.0", **CLEAN},
            {"name": "faulty", "version": "2.0", "vulns": [FAULT]},
            {"name": "unknown", "skip_reason": "Dependency not found on PyPI"},
        ]
    }
    line = "faulty 2.0: GHSA-aaaa-bbbb-cccc, fixed in 2.1"
    assert audit.read_report(report, frozenset()) == ([line], ["unknown"])
    assert audit.read_report(report, frozenset({"CVE-2026-1"})) == ([], ["unknown"])
    assert audit.read_report(report, frozenset({"GHSA-aaaa-bbbb-cccc"})) == ([], ["unknown"])


def test_what_is_accepted_has_a_reason_and_an_end(audit: ModuleType) -> None:
    """The committed file is sound; an entry without a reason is refused, and one whose date has passed is void."""
    today = dt.date(2026, 11, 29)
    committed = (DOCKER / "audit-ignored.toml").read_text()
    audit.read_ignored(committed, today)
    example = re.sub(r"^# (?=\[|\w+ = )", "", committed, flags=re.MULTILINE)
    assert audit.read_ignored(example, today) == {"PYSEC-2026-1"}
    assert audit.read_ignored(example, dt.date(2027, 2, 1)) == frozenset()
    with pytest.raises(ValueError, match="needs id, reason and until"):
        audit.read_ignored(re.sub("reason = .*", 'reason = " "', example), today)


@contextmanager
def serve_advisories(known: Mapping[str, str]) -> Iterator[tuple[str, list[Any]]]:
    """An advisory database in OSV's protocol: package -> the advisory of all its versions; yields what it is asked."""
    asked: list[Any] = []

    class Answer(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            query = json.loads(self.rfile.read(int(self.headers["content-length"])))
            asked.append((query["package"]["name"], query["version"]))
            advisory = known.get(query["package"]["name"])
            found: Mapping[str, Any] = {"id": advisory, "summary": "a fault", "affected": []}
            body = json.dumps({"vulns": [found]} if advisory else {}).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with serve_on_thread(ThreadingHTTPServer(("127.0.0.1", 0), Answer)) as place:
        yield f"http://{place}", asked


@pytest.mark.slow
@pytest.mark.skipif(not PIP_AUDIT.exists(), reason="`make audit` makes pip-audit's environment")
def test_the_audit_fails_for_what_the_service_knows_and_warns_where_there_is_none(tmp_path: Path) -> None:
    """The real pip-audit: clean, one vulnerability, the same accepted, and a service that cannot be reached."""
    lock, accepted = tmp_path / "some.lock", tmp_path / "ignored.toml"
    digest = hashlib.sha256(b"").hexdigest()
    lock.write_text("".join(f"{line} --hash=sha256:{digest}\n" for line in ("sound==1.0", "faulty==2.0+cpu")))
    accepted.write_text("")

    def run(url: str, *flags: str) -> tuple[int, str]:
        command = [sys.executable, str(DOCKER / "audit.py"), str(PIP_AUDIT), "--service", "osv", "--osv-url", url]
        command += ["--lock", str(lock), "--ignored", str(accepted), *flags]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE_S)
        return done.returncode, done.stdout + done.stderr

    with serve_advisories({}) as (url, asked):
        assert run(url) == (0, "no known vulnerabilities in some.lock\n")
        assert sorted(asked) == [("faulty", "2.0"), ("sound", "1.0")]
    with serve_advisories({"faulty": "PYSEC-2026-7"}) as (url, _):
        code, said = run(url, "--warn-unreachable")
        assert code == 1
        assert "faulty 2.0: PYSEC-2026-7" in said
        accepted.write_text('[[ignored]]\nid = "PYSEC-2026-7"\nreason = "not called"\nuntil = 9999-12-31\n')
        assert run(url)[0] == 0
    nobody = f"http://127.0.0.1:{find_free_port()}"
    code, said = run(nobody)
    assert code == 2
    assert "warning: not looked up: pip-audit ended with 1" in said
    assert run(nobody, "--warn-unreachable")[0] == 0

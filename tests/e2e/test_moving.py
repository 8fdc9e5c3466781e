"""The page for those who come from TorchServe: its walk as it stands, and its table of errors.

The walk's server is started from what `fleetcast migrate` has printed.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import pytest

from loadtest.observe.processes import find_free_port
from tests.archiver import install_archiver
from tests.archives import make_mar_manifest, make_zip
from tests.e2e.server import ROOT, Server, run_server
from tests.patience import PATIENCE_S, wait_until
from tests.s3 import S3Server

pytestmark = pytest.mark.e2e

PAGE = (ROOT / "docs" / "coming-from.md").read_text()
HANDLER = """
import os, time
def handle(data, context):
    if data is None:
        return None
    mode = data[0]["body"]["mode"]
    if mode == "raise":
        raise ValueError("no")
    if mode == "loop":
        time.sleep(60)
    if mode == "exit":
        os._exit(3)
    if mode == "memory":
        return [len(bytearray(3 << 30))]
    return [mode] * (2 if mode == "two" else 1)
"""


class Block(NamedTuple):
    """A fenced block of the page."""

    language: str
    text: str


def read_walk(ports: dict[str, str]) -> list[Block]:
    """The blocks of the section that is walked, with other ports: also that which our client takes without a flag."""
    section = PAGE.split("\n## ")[1].replace("fleetcast invoke ", "fleetcast invoke --url http://127.0.0.1:8080 ")
    for old, new in ports.items():
        section = section.replace(old, new)
    return [Block(*found) for found in re.findall(r"```(\w+)\n(.*?)```", section, re.DOTALL)]


def write_file(folder: Path, block: Block) -> None:
    """A file whose first line is its path, as a comment."""
    name = block.text.removeprefix("# ").partition("\n")[0]
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(block.text)


def run_commands(folder: Path, commands: str, archiver: Path) -> str:
    """What the commands of a block print; `fleetcast` is this one."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{archiver}{os.pathsep}{os.environ['PATH']}"
    own = {name: value for name, value in os.environ.items() if not name.startswith("FLEETCAST_")}
    environment = {**own, "PATH": path, "PYTHONPATH": str(ROOT), "COLUMNS": "120"}
    done = subprocess.run(
        ["bash", "-euc", commands], cwd=folder, env=environment, capture_output=True, text=True, check=False,
        timeout=PATIENCE_S,
    )  # fmt: skip
    assert done.returncode == 0, f"{commands}\n{done.stdout}{done.stderr}"
    return done.stdout


def check_output(printed: str, expected: Block) -> None:
    """JSON is the same value, once for each command; of text each line is there."""
    if expected.language == "json":
        decoder, rest, wanted = json.JSONDecoder(), printed.strip(), json.loads(expected.text)
        while rest:
            found, end = decoder.raw_decode(rest)
            assert found == wanted
            rest = rest[end:].strip()
        return
    lines = {" ".join(line.split()) for line in printed.splitlines()}
    assert {" ".join(line.split()) for line in expected.text.splitlines()} <= lines, printed


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_the_walk(s3: S3Server, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """In an empty folder, by the page alone: files, archiver, inspect, migrate, serve, and what clients get."""
    archiver = install_archiver(tmp_path_factory.getbasetemp())
    ports = {port: str(find_free_port()) for port in ("8080", "8081", "8082")}
    blocks = read_walk(ports)
    assert [block.language for block in blocks].count("sh") == 10
    own_ports = dict.fromkeys(("inference_port", "management_port", "metrics_port", "device"))
    printed = ""
    with ExitStack() as stack:
        for block in blocks:
            if block.language in ("python", "properties"):
                write_file(tmp_path, block)
            elif block.text.strip() == "fleetcast serve":
                server = stack.enter_context(run_server(s3, tmp_path, None, **own_ports))
                assert server.url.endswith(ports["8080"])
                wait_until(lambda: len(server.resident()) == 2, "the pinned models are loaded")  # noqa: B023
            elif block.language == "sh":
                printed = run_commands(tmp_path, block.text, archiver)
            else:
                check_output(printed, block)
                printed = ""
    assert printed == ""


@pytest.fixture(scope="module")
def house(s3: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with archives that fail in each of the ways that the page explains."""
    bucket, folder = s3.bucket(), tmp_path_factory.mktemp("errors")
    code = {"h.py": HANDLER.encode()}
    archives = {
        "team/a.mar": code,
        "other.mar": code,
        "team/needs.mar": {**code, "requirements.txt": b"left-pad\n"},
        "team/lacks.mar": {"h.py": b"import nosuch"},
        "team/raises.mar": {"h.py": b"raise RuntimeError('no weights')"},
    }
    for name, members in archives.items():
        s3.put(bucket, name, make_zip({**make_mar_manifest("h.py"), **members}))
    s3.put(bucket, "team/gone.mar", make_zip({**make_mar_manifest("gone.py"), "other.py": b""}))
    settings = {"allow_code": ["team/"], "code_timeout_s": 3, "code_memory_bytes": 256 * 2**20, "max_body_bytes": 4096}
    with run_server(s3, folder, f"s3://{bucket}", **settings) as server:
        yield server


def list_rows() -> list[tuple[str, str]]:
    """Status and first message of each row of the page's table of errors."""
    return re.findall(r"^\| (\d{3}) \| `(.*?)`", PAGE, re.MULTILINE)


def match_rows(status: int, message: str) -> set[str]:
    """The rows that explain such an answer: what varies stands in capitals on the page, or is the version 9.0."""
    patterns = {text: re.sub(r"NAME|KEY|FILE|9\\.0", ".*", re.escape(text)) for _, text in list_rows()}
    return {text for code, text in list_rows() if code == str(status) and re.search(patterns[text], message)}


def test_the_page_explains_what_servers_say(house: Server) -> None:
    """Each error that is provoked here has a row of its status, and each row but that of a start is provoked."""
    predict, models = f"{house.url}/predictions/", f"{house.addresses['management']}/models"
    said = [
        house.http.post(predict + name, json={"mode": mode})
        for name, mode in (
            ("nosuch", "x"), ("other", "x"), ("team/needs", "x"), ("team/lacks", "x"), ("team/raises", "x"),
            ("team/gone", "x"), ("team/a", "raise"), ("team/a", "two"), ("team/a", "loop"), ("team/a", "exit"),
            ("team/a", "memory"), ("team/a", "x" * 5000),
        )
    ]  # fmt: skip
    queries = ("url=nosuch.mar", "url=https://127.0.0.1/a.mar", *["url=team/a.mar&model_name=a"] * 2)
    said += [house.http.post(f"{models}?{query}") for query in queries]
    said += [house.http.post(predict + name, json={"mode": "x"}) for name in ("a", "a/9.0")]
    assert [reply.text for reply in said if reply.is_success] == [said[14].text]
    refused = [(reply.status_code, reply.json()["message"]) for reply in said if not reply.is_success]
    assert [each for each in refused if not match_rows(*each)] == []
    explained = set().union(*(match_rows(*each) for each in refused))
    assert {text for _, text in list_rows()} - explained == {"no worker is up yet"}
    assert match_rows(500, "something else") == set()

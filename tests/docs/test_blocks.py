"""Every block of code of the pages runs as it stands, in the order of its page, or is in the table with a reason.

A page has a fresh folder with prices, models and the request that `make run` leaves. All pages ask one server, which
also stands for those that they start: of `fleetcast serve` the flags and their values are checked. For the pages of
SERVED the folder `models` is the server's store.
"""

import json
import math
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from datetime import datetime, timedelta
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from typer.testing import CliRunner

from loadtest.cli import app as load_app
from server.cli.main import app
from server.cli.setting_flags import settings_from
from server.settings import Settings
from tests.docs.blocks import DATA, ROOT, SHELLS, Block, Command, list_commands, list_pages, read_blocks
from tests.e2e.clients import INSTALL_S, keep_variables, make_environment
from tests.e2e.forecasters import pack_hourly
from tests.e2e.server import Server, run_server
from tests.handlers.kinds.test_onnx import make_doubling
from tests.patience import PATIENCE_S, wait_until
from tests.s3 import S3Server

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(INSTALL_S + PATIENCE_S)]

TABLE: Mapping[str, Any] = tomllib.loads((ROOT / "tests/docs/not_run.toml").read_text())
#: Pages whose models are in the server's store.
SERVED = {
    "README.md", "docs/get-started.md", "docs/requests.md", "docs/scenarios.md", "docs/models-from-prices.md",
    "docs/files-and-streams.md", "docs/your-models.md",
}  # fmt: skip
#: Packages of a page's Python that are not in the tests' own environment.
PACKAGES = {"docs/models-from-onnx.md": ("skl2onnx==1.20.0", "scikit-learn<1.9")}
#: The `fleetcast` commands that ask the inference listener, and those that ask the management listener.
ASKING = ("invoke",)
MANAGING = ("top", "ls", "load", "unload", "pin", "unpin", "reload", "rollback", "follow", "release")
DRIVER = """
import sys, traceback
names = {"__name__": "__main__"}
for line in sys.stdin:
    try:
        exec(compile(open(line.strip()).read(), line.strip(), "exec"), names)
        print("\\ndone: well", flush=True)
    except BaseException:
        traceback.print_exc()
        print("\\ndone: badly", flush=True)
"""
PAGES = [page for page in list_pages() if read_blocks(page)]


class House(NamedTuple):
    """The server of all pages, the folder that is its store, and the folder with what a page's folder begins with."""

    server: Server
    store: Path
    start: Path


def write_prices(path: Path) -> None:
    """Hours of two markets with a forecast of their load, from October 2023 to August 2024."""
    chance, begin = random.Random(0), datetime(2023, 10, 1)  # noqa: DTZ001 -- the stamps of a price file have no zone
    with path.open("w") as file:
        file.write("hour,NSW1,VIC1,load_NSW1,load_VIC1\n")
        for i in range(335 * 24):
            day = math.sin(i / 24 * 2 * math.pi)
            a, b = 60 + 25 * day + chance.gauss(0, 6), 55 + 20 * day + chance.gauss(0, 5)
            hour = begin + timedelta(hours=i)
            file.write(f"{hour:%Y-%m-%d %H:%M},{a:.2f},{b:.2f},{1000 + 90 * day:.0f},{900 + 80 * day:.0f}\n")


@pytest.fixture(scope="module")
def house(s3: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    """The server of all pages, with forecasters of 48 hours, and prices with models that were trained on them."""
    store, start = tmp_path_factory.mktemp("store"), tmp_path_factory.mktemp("start")
    for i, name in enumerate(("au/nsw1", "au/vic1", "au/nsw1/energy")):
        (store / name).parent.mkdir(parents=True, exist_ok=True)
        (store / f"{name}.mar").write_bytes(pack_hourly(i))
    write_prices(start / "prices.csv")
    shutil.copy(start / "prices.csv", start / "newer.csv")
    (start / "model.onnx").write_bytes(make_doubling("n", 4))
    instance = {"start": "2026-01-01 00:00:00", "target": [50.0 + hour % 24 for hour in range(48)]}
    command = start / ".venv/bin/fleetcast"  # this checkout's, whatever is installed
    command.parent.mkdir(parents=True)
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -P -c "from server.cli.main import main; main()" "$@"\n')
    command.chmod(0o755)
    (start / ".fleetcast").mkdir()
    (start / ".fleetcast/request.json").write_text(json.dumps({"instances": [instance]}))
    trained = ("--target", "NSW1", "--target", "VIC1", "--train-until", "2024-07-01", "--out", str(start / "models"))
    done = CliRunner().invoke(app, ["train", str(start / "prices.csv"), "--time", "hour", *trained])
    assert done.exit_code == 0, done.output
    shutil.copytree(start / "models", store, dirs_exist_ok=True)
    folder = tmp_path_factory.mktemp("house")
    settings = {"grpc_port": 0, "actuals": folder / "actuals", "model_cache_bytes": "64MiB"}
    with run_server(s3, folder, str(store), **settings) as server:
        yield House(server, store, start)


def make_folder(house: House, page: str, folder: Path) -> None:
    """What a reader of the page has before its first block."""
    shutil.copytree(house.start, folder, dirs_exist_ok=True)
    if page in SERVED:
        shutil.rmtree(folder / "models")
        (folder / "models").symlink_to(house.store)


def find_reason(block: Block) -> str | None:
    """Why a block is not run, as the table says; None for one that has to run."""
    for each in TABLE["blocks"]:
        if fnmatch(block.page, each["page"]) and any(
            line.startswith(each["begins"]) for line in block.text.splitlines()
        ):
            return str(each["why"])
    if block.language in SHELLS:
        programs = {command.words[0] for command in list_commands(block)} & TABLE["programs"].keys()
        return next((TABLE["programs"][program] for program in programs), None)
    return None


# --- the table and what is not run ------------------------------------------------------------------------------------


def test_every_block_is_of_a_kind_that_is_checked() -> None:
    """Python and shells run, data are read, text is shown; a block without a language could hide a command."""
    for page in PAGES:
        for block in read_blocks(page):
            assert block.language in ("python", "text", "dockerfile", *SHELLS, *DATA), block.place
            if block.language == "text":
                assert not re.search(r"^(fleetcast|curl|pip|docker)\b", block.text, re.MULTILINE), block.place


def test_the_table_has_no_entry_too_many() -> None:
    """Each program and block of it is on a page, and each other test names the page that it runs."""
    blocks = [block for page in PAGES for block in read_blocks(page)]
    words = {command.words[0] for block in blocks if block.language in SHELLS for command in list_commands(block)}
    assert not TABLE["programs"].keys() - words
    for each in TABLE["blocks"]:
        begins = [line for block in blocks if fnmatch(block.page, each["page"]) for line in block.text.splitlines()]
        assert any(line.startswith(each["begins"]) for line in begins), each
    for page, test in TABLE["pages"].items():
        assert Path(page).name in (ROOT / test).read_text(), page


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_have_their_flags(page: Path) -> None:
    """Also of blocks that are not run: commands of ours parse, and targets of make and extras of pip are there."""
    makefile, project = (ROOT / "Makefile").read_text(), (ROOT / "pyproject.toml").read_text()
    for block in read_blocks(page):
        for command in list_commands(block) if block.language in SHELLS else ():
            words = command.words
            if Path(words[0]).name in ("fleetcast", "fleetcast-load"):
                check_command(words, block)
            elif words[0] == "make" and len(words) > 1:
                assert re.search(rf"^{words[1]}:", makefile, re.MULTILINE), block.place
            elif words[0] == "pip":
                for extra in re.findall(r"fleetcast\[([\w,]+)\]", " ".join(words)):
                    assert all(f"\n{each} = [" in project for each in extra.split(",")), block.place


def check_command(words: tuple[str, ...], block: Block) -> None:
    """Raises AssertionError unless the command has the options that it is given."""
    end = next((i for i, word in enumerate(words) if word in ("|", ">", ">>", "&&")), len(words))
    program = app if Path(words[0]).name == "fleetcast" else load_app
    done = CliRunner().invoke(program, [*words[1:end], "--help"])
    assert done.exit_code == 0, f"{block.place}\n{words}: {done.output}"


# --- what runs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if str(page.relative_to(ROOT)) not in TABLE["pages"]],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_a_page_does_what_it_says(house: House, page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its blocks in order, in a folder of its own: each ends well, and none prints an error."""
    blocks = read_blocks(page)
    if all(find_reason(block) or (block.language in ("text", *DATA) and not block.file) for block in blocks):
        for block in blocks:
            read_data(block)
        return
    make_folder(house, blocks[0].page, tmp_path)
    monkeypatch.chdir(tmp_path)
    with ExitStack() as stack:
        reader = Reader(house.server, tmp_path, blocks[0].page, stack)
        for block in blocks:
            if find_reason(block) is None:
                reader.follow(block)


def read_data(block: Block) -> None:
    """Data are well-formed."""
    if block.language == "json":
        json.loads(block.text)
    elif block.language == "toml":
        tomllib.loads(block.text)
    elif block.language == "yaml":
        yaml.safe_load(block.text)


class Reader:
    """Someone who follows a page, block by block, in the working folder."""

    def __init__(self, server: Server, folder: Path, page: str, stack: ExitStack) -> None:
        self._server, self._folder, self._stack = server, folder, stack
        packages = PACKAGES.get(page)
        self._own = packages is None
        self._python = make_environment(*packages) if packages else Path(sys.executable)
        self._interpreter: subprocess.Popen[str] | None = None
        self._blocks = 0

    def follow(self, block: Block) -> None:
        """Do what the block says. Raises AssertionError where that fails."""
        self._blocks += 1
        read_data(block)
        if block.file:
            (self._folder / block.file).parent.mkdir(parents=True, exist_ok=True)
            (self._folder / block.file).write_text(block.text)
        elif block.language == "python":
            self._run_python(block)
        elif block.language in SHELLS:
            self._run_shell(block)

    def _run_python(self, block: Block) -> None:
        """In one interpreter for the page, as its names are for all blocks of it."""
        script = self._folder / f"block{self._blocks}.py"
        script.write_text(self._place(block.text))
        if self._interpreter is None:
            self._interpreter = subprocess.Popen(
                [self._python, "-c", DRIVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                text=True, cwd=self._folder, env=self._environment(),
            )  # fmt: skip
            self._stack.callback(self._end_interpreter)
        assert self._interpreter.stdin is not None
        assert self._interpreter.stdout is not None
        self._interpreter.stdin.write(f"{script}\n")
        self._interpreter.stdin.flush()
        printed = ""
        while not (printed.endswith(("\ndone: well\n", "\ndone: badly\n"))):
            line = self._interpreter.stdout.readline()
            assert line, f"{block.place}\n{printed}"
            printed += line
        assert printed.endswith("well\n"), f"{block.place}\n{printed[-3000:]}"

    def _end_interpreter(self) -> None:
        assert self._interpreter is not None
        self._interpreter.communicate()

    def _run_shell(self, block: Block) -> None:
        """In this process where all are plain commands of ours, as starting each takes a second; else by bash."""
        commands = list(list_commands(block))
        for command in commands:
            if command.words[:2] == ("fleetcast", "serve"):
                check_serve(command, block)
        if all(command.plain and command.words[0] == "fleetcast" for command in commands):
            for command in commands:
                if command.words[1] != "serve":
                    self._run_ours(command, block)
            return
        text = re.sub(r"^fleetcast serve .*(?:\\\n.*)*$", "true", self._place(block.text), flags=re.MULTILINE)
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", text], cwd=self._folder, env=self._environment(),
            capture_output=True, text=True, check=False, timeout=PATIENCE_S,
        )  # fmt: skip
        assert done.returncode == 0, f"{block.place}\n{done.stdout[-2000:]}{done.stderr[-3000:]}"
        assert '"error": {' not in done.stdout, f"{block.place}\n{done.stdout[-2000:]}"
        assert '"error":{' not in done.stdout, f"{block.place}\n{done.stdout[-2000:]}"

    def _run_ours(self, command: Command, block: Block) -> None:
        words = shlex.split(self._place(shlex.join(command.words)))[1:]
        expanded = [
            each for word in words for each in (sorted(map(str, Path().glob(word))) if "*" in word else []) or [word]
        ]
        done = CliRunner().invoke(app, expanded)
        assert done.exit_code == 0, f"{block.place}\n{done.output[-3000:]}"

    def _place(self, text: str) -> str:
        """The text with the test's addresses, also where the page relies on those that are usual."""
        addresses = self._server.addresses
        for port, name in ((8080, "inference"), (8081, "management"), (8082, "metrics")):
            host = rf"(?:127\.0\.0\.1|localhost):{port}\b"
            text = re.sub(f"http://{host}", addresses[name], text)
            text = re.sub(host, addresses[name].removeprefix("http://"), text)
        if "127.0.0.1:8001" in text:
            text = text.replace("127.0.0.1:8001", self._server.grpc)
        for commands, name in ((ASKING, "inference"), (MANAGING, "management")):
            text = re.sub(
                rf"\b(fleetcast (?:{'|'.join(commands)}))(?![\w-])(?! .*--url)", rf"\1 --url {addresses[name]}", text
            )
        if "0eae77" in text:  # a version, as the page shows it
            text = text.replace("0eae77", self._read_version("au/nsw1.mar"))
        return text

    def _read_version(self, model: str) -> str:
        self._server.fleet("load", model).raise_for_status()
        url = f"{self._server.addresses['management']}/fleet/versions/{model}"
        versions = wait_until(lambda: self._server.http.get(url).json()["versions"], "the version is on record")
        version: str = versions[0]["version"]
        return version

    def _environment(self) -> dict[str, str]:
        own = {"PYTHONPATH": f"{ROOT}:{ROOT / 'server' / 'sdk'}"} if self._own else {}
        path = os.pathsep.join([str(self._folder / ".venv/bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
        return {**keep_variables(), **own, "PATH": path, "NO_PROXY": "*", "TOKEN": "any", "COLUMNS": "200"}


def check_serve(command: Command, block: Block) -> None:
    """The settings of a server that a page starts are valid: flags, the block's variables, the folder's file."""
    given: dict[str, Any] = {}
    words = list(command.words[2:])
    while words:
        name = words.pop(0).removeprefix("--").replace("-", "_")
        assert name in Settings.model_fields, f"{block.place}: {name}"
        given.setdefault(name, []).append(words.pop(0))
    lists = ("allow_code", "pin", "allowed_hosts")
    variables = dict(re.findall(r"FLEETCAST_([A-Z_]+)=(\S+)", block.text))
    flags = {name: values if name in lists else values[0] for name, values in given.items()}
    settings_from({**{name.lower(): value for name, value in variables.items()}, **flags})

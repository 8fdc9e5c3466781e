"""Both commands in a shell: one style of help, completion in bash and zsh, and nothing imported before it is needed."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from loadtest.cli import COMMANDS as LOAD_COMMANDS
from loadtest.cli_groups import BENCHMARKS, DEMOS
from server.cli.main import COMMANDS
from tests.e2e.models import pack_forecaster

ROOT = Path(__file__).parents[3]
PROGRAMS = {"fleetcast": "server.cli.main", "fleetcast-load": "loadtest.cli"}
#: What takes long to import, and what no help text needs.
HEAVY = frozenset({"torch", "onnxruntime", "numpy", "boto3", "botocore", "obstore", "pyarrow", "uvicorn", "grpc"})
OTHER_WORK = frozenset({"structlog", "msgspec", "urllib3", "prometheus_client", "pydantic_settings", "jinja2", "rich"})
IMPORTED = """
import json, sys
from importlib import import_module
program, *asked = json.loads(sys.argv[1])
for arguments in asked:
    sys.argv[1:] = arguments
    try:
        import_module(program).main()
    except SystemExit as end:
        assert not end.code, end.code
print(json.dumps(sorted(sys.modules)))
"""


def import_for(module: str, *asked: list[str]) -> set[str]:
    """Run the commands in one process of their own, each ending well: the modules that they imported together."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", IMPORTED, json.dumps([module, *asked])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def complete(program: str, shell: str, words: str) -> list[str]:
    """What a shell offers after these words."""
    asked = {
        "bash": {"COMP_WORDS": words, "COMP_CWORD": str(len(words.split(" ")) - 1)},
        "zsh": {"_TYPER_COMPLETE_ARGS": words},
    }[shell]
    variable = f"_{program.replace('-', '_').upper()}_COMPLETE"
    environment = {**os.environ, **asked, "PYTHONPATH": str(ROOT), variable: f"complete_{shell}"}
    command = [sys.executable, "-m", PROGRAMS[program]]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return done.stdout.split() if shell == "bash" else [done.stdout]


@cache
def show_help(module: str, *words: str) -> str:
    """The help of a command, which is the same by `-h` and by `--help`."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", module, *words, "-h"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


@pytest.mark.slow
@pytest.mark.parametrize("module", PROGRAMS.values())
def test_a_programs_help_imports_no_work(module: str) -> None:
    """The list of commands needs the standard library and typer alone."""
    assert import_for(module, ["--help"]) & (HEAVY | OTHER_WORK) == set()


@pytest.mark.slow
def test_a_commands_help_imports_no_work() -> None:
    """The help of each command of `fleetcast` is there before anything that reads a store, computes or serves."""
    asked = [[command, "--help"] for command, about in COMMANDS.items() if about]
    assert import_for("server.cli.main", *asked) & HEAVY == set()


@pytest.mark.slow
@pytest.mark.parametrize("words", [("run",), ("plan",), ("bench",)])
def test_help_of_the_load_tester_has_the_same_style(words: tuple[str, ...]) -> None:
    """Plain text with `-h` as its last option: no boxes, no markup."""
    shown = show_help("loadtest.cli", *words)
    assert "-h, --help" in shown
    assert "[bold]" not in shown
    assert "╭" not in shown


def test_flags_are_listed_in_sections() -> None:
    """The many flags of a run stand below what they are about."""
    shown = show_help("loadtest.cli", "run")
    places = [
        shown.index(f"\n{section}:\n") for section in ("Load", "Server", "What must be reached", "Output", "Options")
    ]
    assert places == sorted(places)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "words", "expected"),
    [
        ("fleetcast", "fleetcast retr", "retrain"),
        ("fleetcast", "fleetcast serve --model-cache", "--model-cache-bytes"),
        ("fleetcast-load", "fleetcast-load cal", "calibrate"),
        ("fleetcast-load", "fleetcast-load run --protocol sagemaker --profile onb", "onboarding"),
        ("fleetcast-load", "fleetcast-load bench ov", "overload"),
    ],
)
def test_completion_knows_commands_flags_and_choices(program: str, words: str, expected: str) -> None:
    """Bash and zsh are offered what a word may become, of commands whose files were not imported before."""
    assert complete(program, "bash", words) == [expected]
    assert f'"{expected}"' in complete(program, "zsh", words)[0]


@pytest.mark.slow
def test_a_command_is_completed_without_its_file() -> None:
    """The tables of commands name every command, so that a word's completion imports none of them."""
    for program, names in (("fleetcast", COMMANDS), ("fleetcast-load", [*LOAD_COMMANDS, "bench", "demo"])):
        shown = {name for name in names if name != "settings-table"}
        assert set(complete(program, "bash", f"{program} ")) == shown
    assert set(complete("fleetcast-load", "bash", "fleetcast-load bench ")) == set(BENCHMARKS)
    assert set(complete("fleetcast-load", "bash", "fleetcast-load demo ")) == set(DEMOS)


@pytest.mark.slow
def test_inspect_reads_a_forecaster_without_torch(tmp_path: Path) -> None:
    """What the records and the shapes of the tensors say is shown before torch could be imported."""
    archive = tmp_path / "f.mar"
    archive.write_bytes(pack_forecaster("f", 1).data)
    assert (
        import_for("server.cli.main", ["inspect", str(archive)]) & {"torch", "onnxruntime", "boto3", "structlog"}
        == set()
    )

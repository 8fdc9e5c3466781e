"""Texts from archives are printed without markup, links, control characters or additional lines."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper
from typer.testing import CliRunner, Result

import server
from model_store.archives.archive import open_archive
from model_store.archives.manifest import FLEETCAST_JSON
from server.cli.main import app
from server.shell.escaping import escape_text
from tests.archives import make_forecaster, make_zip, repack
from tests.e2e.models import pack_forecaster

MARKUP = "[red]x[/red] [link=file:///etc/passwd]click[/link] oops [/bold] tail"
CONTROLS = "\x1b]0;title\x07\x1b[2J\x9b31m\u202e\u200bok   good.mar: tcn\nok   good.mar: tcn"
FORGED = "good.mar: tcn"


def run(*arguments: str) -> Result:
    """The command in this process."""
    return CliRunner().invoke(app, list(arguments))


def make_described(text: str) -> bytes:
    """An archive with this description."""
    spec = json.loads(open_archive(make_forecaster(), "m").read(FLEETCAST_JSON))
    return repack(make_forecaster(), fleetcast_json=json.dumps({**spec, "description": text}).encode())


def with_golden(text: bytes) -> bytes:
    """A sound model with this golden sample, unread."""
    sound = pack_forecaster("m", 1).data
    archive = open_archive(sound, "m")
    members = {name: archive.read(name) for name in archive.members}
    spec = {**json.loads(members[FLEETCAST_JSON]), "golden": "golden.json"}
    return make_zip({**members, FLEETCAST_JSON: json.dumps(spec).encode(), "golden.json": text})


def make_dangling(name: str) -> bytes:
    """An ONNX archive whose error message has this name."""
    node = helper.make_node("Relu", [name], ["y"])
    x, y = (helper.make_tensor_value_info(each, TensorProto.FLOAT, ["n", 2]) for each in "xy")
    model: onnx.ModelProto = helper.make_model(helper.make_graph([node], "g", [x], [y]), ir_version=8)
    return make_zip({"model.onnx": model.SerializeToString()})


def nested_golden() -> bytes:
    """JSON that is deeper than its readers go."""
    return with_golden(b'{"request": {"x": %b1%b}, "response": {}}' % (b"[" * 400, b"]" * 400))


def huge_golden() -> bytes:
    """An integer that no reader of requests takes."""
    return with_golden(b'{"request": {"x": [1%b]}, "response": {}}' % (b"0" * 30))


def test_markup_is_shown_as_it_is(tmp_path: Path) -> None:
    """`inspect` shows the brackets of a description, and makes no link of them."""
    (tmp_path / "m.mar").write_bytes(make_described(MARKUP))
    result = run("inspect", str(tmp_path / "m.mar"))
    assert result.exit_code == 0, result.output
    assert " ".join(MARKUP.split()) in " ".join(result.output.split())


def test_controls_are_escaped(tmp_path: Path) -> None:
    """`inspect` shows control and format characters by their numbers, on the description's own line."""
    (tmp_path / "m.mar").write_bytes(make_described(CONTROLS))
    result = run("inspect", str(tmp_path / "m.mar"))
    assert result.exit_code == 0, result.output
    assert all(line.isprintable() for line in result.output.splitlines())
    shown = "".join(result.output.split())
    assert r"\x1b]0;title\x07\x1b[2J\x9b31m\u202e\u200bok" in shown
    assert not any(line.startswith("ok ") for line in result.output.splitlines())


@pytest.mark.parametrize("make", [lambda: make_dangling(CONTROLS), nested_golden, huge_golden])
def test_verify_says_what_is_bad_and_goes_on(tmp_path: Path, make: Callable[[], bytes]) -> None:
    """One line for each archive, whatever a name in it holds, and the sound one after it is verified."""
    (tmp_path / "bad.mar").write_bytes(make())
    (tmp_path / "sound.mar").write_bytes(pack_forecaster("m", 1).data)
    result = run("verify", str(tmp_path / "bad.mar"), str(tmp_path / "sound.mar"))
    assert result.exit_code == 1
    lines = result.output.splitlines()
    assert [line[:5] for line in lines] == ["BAD  ", "ok   "]
    assert all(line.isprintable() for line in lines)
    assert "fault of this program" not in lines[0]


@given(st.text(max_size=30))
def test_escaped_text_is_printable(text: str) -> None:
    """Whatever the characters; text that is printable stays as it is."""
    assert escape_text(text).isprintable()
    assert escape_text(escape_text(text)) == escape_text(text)
    assert not text.isprintable() or escape_text(text) == text


def test_log_lines_for_people_are_escaped() -> None:
    """In the text form of the log an error of an archive keeps to its line, and a traceback to its lines."""
    code = (
        "import structlog; from server.logs import configure_logs; configure_logs('info', 'text')\n"
        f"text = {CONTROLS!r}\n"
        "log = structlog.get_logger()\n"
        "log.warning('load_failed', error=text, several=[text])\n"
        "try:\n    raise ValueError(text)\n"
        "except ValueError:\n    log.exception('failed')\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(server.__file__).parent.parent)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    lines = done.stderr.splitlines()
    assert "load_failed" in lines[0]
    assert all(line.isprintable() for line in lines)
    assert FORGED in lines[0]
    assert any(line.startswith("Traceback") for line in lines)

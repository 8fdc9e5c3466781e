"""docs/clocks.md: its commands and its Python run as they stand, in the order of the page."""

import re
import shlex
from pathlib import Path

import pytest

from tests.server.markets import run

PAGE = Path(__file__).parents[1] / "docs" / "clocks.md"


@pytest.mark.slow
def test_the_page_does_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A market in Berlin with stamps of UTC: trained, asked on the day of 23 hours, and backtested."""
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```(python|sh)\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert [language for language, _ in blocks] == ["python", "sh", "python", "sh"]
    names: dict[str, object] = {}
    for language, text in blocks:
        if language == "python":
            exec(compile(text, str(PAGE), "exec"), names)
            continue
        result = run(*shlex.split(text)[1:])
        assert result.exit_code == 0, result.output

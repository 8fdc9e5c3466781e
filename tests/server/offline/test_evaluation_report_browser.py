"""The report of a backtest as a reader sees it, in a real browser: light and dark, narrow and wide."""

import json
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from model_store.names import ModelName
from server.cli.setting_flags import settings_from
from server.offline.evaluation_report import render_page
from server.offline.fleet_evaluation import Backtest, backtest_fleet
from server.offline.rolling_windows import InProcess, Rolling
from server.offline.tuning import Candidate, Standing, Tuned
from server.offline.tuning_report import render_leaderboard
from tests.loadtest.browser import CHROMIUM, Browser, open_browser
from tests.loadtest.contrast import find_faint_text
from tests.server.markets import fill, name_products, run, write_prices

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH to open the report in")

EVIL = "<img src=x onerror=alert(1)>"
#: Coloured pixels of each chart: axes, grid and words are grey.
MARKS = """[...document.querySelectorAll(".plot canvas")].map((canvas) => {
  const all = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
  let count = 0;
  for (let i = 0; i < all.length; i += 4)
    count += Math.max(...all.subarray(i, i + 3)) - Math.min(...all.subarray(i, i + 3)) > 60;
  return count;
})"""
WIDE = "document.documentElement.scrollWidth > document.documentElement.clientWidth"


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A browser for all tests: starting one takes a second."""
    with open_browser(tmp_path_factory.mktemp("home")) as found:
        yield found


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two markets, and a failure whose text is hostile."""
    folder = tmp_path_factory.mktemp("report")
    markets = name_products(2)
    csv = write_prices(folder / "prices.csv", markets)
    settings = settings_from({"store": str(fill(folder / "models", markets))})
    targets = {market: ModelName(f"{market}.mar") for market in markets}
    found = backtest_fleet(csv, "hour", targets, settings, InProcess(), Rolling(most=28), lambda *_: None)
    found = Backtest(EVIL, found.store, found.asked, found.markets, found.fans, {EVIL: EVIL})
    path = folder / "report.html"
    path.write_text(render_page(found), encoding="utf-8")
    return path


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1400])
def test_every_chart_is_drawn_and_nothing_complains(reader: Browser, report: Path, width: int, scheme: str) -> None:
    """A fan and the errors by hour of each market have coloured lines; no exception, no refusal by the policy, no
    sideways scrolling, and a hostile name stays text.
    """
    reader.said.clear()
    reader.open(report, width, scheme)
    marks = reader.value(MARKS)
    assert len(marks) == 4
    assert all(count > 200 for count in marks), marks
    assert reader.value("document.querySelectorAll('.pit rect').length") == 2 * 4
    assert not reader.value(WIDE)
    assert reader.value("document.images.length") == 0
    assert find_faint_text(reader) == []
    cards = reader.value(
        "(() => { const t = document.querySelector('.cards').parentElement; return t.scrollWidth - t.clientWidth; })()"
    )
    assert cards <= 0 or width > 700, "on a telephone no table scrolls sideways"
    assert reader.said == []


def test_the_verdict_is_what_the_scores_say(reader: Browser, tmp_path: Path) -> None:
    """An archive that was fitted is better than naive, one of random weights is worse; the command stands below."""
    csv = write_prices(tmp_path / "prices.csv", ["M00"], days=60)
    fitted = (
        "--target",
        "M00",
        "--architecture",
        "lear",
        "--train-until",
        "2024-04-20",
        "--out",
        str(tmp_path / "good"),
    )
    assert run("train", str(csv), "--time", "hour", *fitted).exit_code == 0
    fill(tmp_path / "bad", ["M00"])
    for store, word, tone in (("good", "smaller", "good"), ("bad", "larger", "bad")):
        page = tmp_path / f"{store}.html"
        asked = ("backtest", str(csv), "--time", "hour", "--models", str(tmp_path / store), "--from", "2024-04-20")
        told = run(*asked, "--html", str(page), "--json")
        assert told.exit_code == 0, told.output
        (market,) = json.loads(told.stdout)["markets"]
        assert (market["scores"]["rmae"] < 1) == (tone == "good")
        reader.open(page, 390)
        verdict = reader.value("document.querySelector('.verdict').innerText")
        assert f"the error is {abs(1 - market['scores']['rmae']):.1%} {word}" in verdict
        assert reader.value("document.querySelector('.verdict').className") == f"verdict {tone}"
        command = reader.value("document.querySelector('footer pre').textContent")
        assert command == shlex.join(["fleetcast", *asked, "--html", str(page), "--json"])


def test_a_leaderboard_fits_a_telephone(reader: Browser, tmp_path: Path) -> None:
    """Long recipes and a long command wrap; what a cell is stands beside it."""
    recipe = Candidate(("--architecture", "lear,lear:3,ddnn:2", "--stack", "--scaling", "linear"), "lear", {})
    standing = Standing(recipe, 2, 12, 0.31, 0.7, 3.2, 0.33, 0.71)
    found = Tuned([standing] * 3, [(3, 4), (3, 12)], 65.0, 1, ("2024-06-21", "2024-07-18", 1), {})
    page = tmp_path / "tune.html"
    page.write_text(
        render_leaderboard(found, "prices.csv", "fleetcast train prices.csv " + "--target X " * 30), "utf-8"
    )
    for scheme in ("light", "dark"):
        reader.open(page, 390, scheme)
        assert not reader.value(WIDE)
        assert (
            reader.value(
                "(() => { const t = document.querySelector('.scroll'); return t.scrollWidth - t.clientWidth; })()"
            )
            <= 0
        )
        assert find_faint_text(reader) == []


def test_the_legend_tells_levels_apart_and_reads_values(reader: Browser, report: Path) -> None:
    """Each band has a swatch as dark as the band is drawn; the arrow keys read prices, and axes say their units."""
    reader.open(report)
    names = reader.value(
        "[...document.querySelector('.legend').querySelectorAll('.name')].map((each) => each.textContent)"
    )
    assert names[:3] == ["time", "actual price", "median"]
    assert names[3].startswith("80% band, held ")
    reader.value("document.querySelector('.plot').focus()")
    for _ in range(2):
        reader.call("Input.dispatchKeyEvent", type="keyDown", key="ArrowLeft", code="ArrowLeft")
    read = "[...document.querySelector('.legend').querySelectorAll('output')].map((each) => each.textContent)"
    time, actual, median, band = reader.value(read)
    rows = reader.value(
        "[...document.querySelector('figure table').rows].map((row) => [...row.cells].map((c) => c.textContent))"
    )
    row = dict(zip(rows[0], next(row for row in rows if row[0] == time), strict=True))
    assert float(actual) == pytest.approx(float(row["actual"]), abs=0.01)
    assert float(median) == pytest.approx(float(row["level 0.5"]), abs=0.01)
    assert [float(each) for each in band.split(" to ")] == pytest.approx(
        [float(row["level 0.1"]), float(row["level 0.9"])], abs=0.01
    )

"""The report of a backtest as a reader sees it, in a real browser: light and dark, narrow and wide."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from model_store.names import ModelName
from server.cli.setting_flags import settings_from
from server.offline.evaluation_report import render_page
from server.offline.fleet_evaluation import Backtest, backtest_fleet
from server.offline.rolling_windows import InProcess, Rolling
from tests.loadtest.browser import CHROMIUM, Browser, open_browser
from tests.server.markets import fill, name_products, write_prices

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
@pytest.mark.parametrize("width", [380, 1280])
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
    assert reader.said == []

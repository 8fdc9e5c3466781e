"""`make forecast-demo` as a user has it: from a CSV file to a page, by a server of its own and by one that runs."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest

from loadtest.driver.market_client import STAGES, Turn, TurnBodies, rank_correlation
from loadtest.fleets.synthetic_markets import make_coupled_markets
from loadtest.observe.local_server import run_local_server
from loadtest.observe.processes import find_free_port
from loadtest.report.market_cycle import (
    CycleResults,
    choose_charted,
    find_extremes,
    format_budget_share,
    render_cycle_page,
)
from tests.loadtest.browser import CHROMIUM, Browser, open_browser
from tests.loadtest.contrast import find_faint_text

ROOT = Path(__file__).parents[3]
STORE = ".fleetcast/cycle/store"
PRODUCTS = ("a/energy", "a/</script><img src=x onerror=alert(1)>", "b/energy")


def forecast_demo(folder: Path, *flags: str) -> "subprocess.CompletedProcess[str]":
    """The command, in a folder of its own."""
    command = [
        sys.executable,
        "-m",
        "loadtest.cli",
        "demo",
        "market-cycle",
        "--once",
        "--csv",
        "prices.csv",
        "--time",
        "hour",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run([*command, *flags], cwd=folder, env=environment, capture_output=True, text=True, check=False)


def write_prices(path: Path) -> list[str]:
    """Six weeks of four products that move together, in a user's own file, one price missing; the products."""
    markets = make_coupled_markets(["x", "y"], ["energy", "lower"], 0, 24 * 42, 24)
    lines = [",".join(["hour", *(each.name for each in markets)])]
    lines += [
        ",".join([markets[0].stamp(at), *(f"{each.values[at]:.2f}" for each in markets)])
        for at in range(len(markets[0].values))
    ]
    stamp, _, *rest = lines[-30].split(",")
    lines[-30] = ",".join([stamp, "", *rest])
    path.write_text("\n".join(lines) + "\n")
    return [each.name for each in markets]


@pytest.mark.e2e
def test_the_whole_cycle(tmp_path: Path) -> None:
    """Fitted, correlated, served, asked, drawn; then the same by a server that runs, and nothing is made again."""
    products = write_prices(tmp_path / "prices.csv")
    ports = [text for name in ("inference", "management", "metrics") for text in (f"--{name}-port", "0")]
    found = forecast_demo(tmp_path, "--ticks", "3", "--scenarios", "20", *ports)
    assert found.returncode == 0, found.stderr
    assert re.search(r"fitted and correlated 4 products of prices\.csv in \d+ s", found.stdout)
    for stage in (*STAGES, "together"):
        assert re.search(rf"{stage} +│ +[\d.]+ │ +[\d.]+ │ +[<\d. ]+%", found.stdout), stage
    assert re.search(r"first miss=4; .*\n.*last  hit=4; ", found.stdout)
    html = (tmp_path / ".fleetcast/cycle/cycle.html").read_text()
    assert "4 products of prices.csv" in html
    data = json.loads(re.findall(r'id="charts">(.*?)</script>', html)[0])
    assert [chart["name"] for chart in data["charts"]] == products == data["names"]
    assert np.array(data["charts"][0]["scenarios"]).shape == (20, 24)
    assert [at for at, price in enumerate(data["charts"][0]["prices"]) if price is None] == [39]  # 15 hours ahead
    asked = json.loads((tmp_path / ".fleetcast/cycle/scenarios.json").read_text())
    assert [each["target_model"] for each in asked["requests"]] == [f"{product}.mar" for product in products]

    with run_local_server(str(tmp_path / STORE), ["--workers", "1"]) as server:
        again = forecast_demo(tmp_path, "--url", server.inference)
        assert (again.returncode, again.stderr) == (0, "")
        assert "4 products of prices.csv are in .fleetcast/cycle/store already" in again.stdout
        some = forecast_demo(tmp_path, "--url", server.inference, "--target", "no/such")
    assert (some.returncode, "no/such" in some.stderr) == (1, True)
    nobody = forecast_demo(tmp_path, "--url", f"http://127.0.0.1:{find_free_port()}")
    assert nobody.returncode == 1
    assert "does not answer" in nobody.stderr
    assert "fleetcast serve --store .fleetcast/cycle/store" in nobody.stderr


# --- the page -------------------------------------------------------------------------------------------------------


def draw_turn(products: Sequence[str], steps: int = 12, scenarios: int = 30) -> CycleResults:
    """A turn of seeded random numbers, in which a price is missing."""
    rng = np.random.default_rng(2)
    common = rng.normal(size=(scenarios, 1, steps)).cumsum(axis=2)
    samples = (50 + 5 * common + rng.normal(size=(scenarios, len(products), steps))).astype(np.float32)
    quantiles = np.quantile(samples.astype(np.float64), [0.1, 0.5, 0.9], axis=0).transpose(1, 2, 0)
    prices = rng.normal(50, 5, (len(products), 2 * steps))
    prices[0, 3] = np.nan
    ms = MappingProxyType({stage: 1.5 + i for i, stage in enumerate(STAGES)})
    said = dict.fromkeys(STAGES, "hit=2; inference;dur=0.5")
    turn = Turn("2025-01-06 12:00:00", ms, said, TurnBodies(b"", b""), [0.1, 0.5, 0.9], quantiles, samples)
    start = datetime(2025, 1, 6)  # noqa: DTZ001 -- stamps have no zone
    calls = [("all", "curl http://127.0.0.1:1/v1/forecasts")]
    together = rank_correlation(samples)
    return CycleResults(
        "2 products", "EUR/MWh", products, start, timedelta(hours=1), prices, [turn] * 3, together, calls
    )


def test_charts_are_of_different_groups() -> None:
    """The first of each region, then the last of each, and no more than nine; without regions the ends first."""
    names = [f"{region}/{product}" for region in "abcde" for product in ("energy", "raise", "lower")]
    assert [names[i] for i in choose_charted(names)][:4] == ["a/energy", "a/lower", "b/energy", "b/lower"]
    assert len(choose_charted(names)) == 9
    assert choose_charted(["NSW1", "VIC1"]) == [0, 1]
    assert choose_charted(["A.x", "A.y", "A.z", "B.x", *(f"C.{i}" for i in range(9))])[:3] == [0, 1, 2]
    assert choose_charted(["NSW1"]) == [0]


@pytest.mark.slow
def test_extremes_are_the_strongest_pairs() -> None:
    """Alike from the highest down, opposed from the lowest up, each only with its sign."""
    together = np.array([[1, 0.9, -0.2], [0.9, 1, 0.1], [-0.2, 0.1, 1]])
    assert find_extremes("abc", together, 5) == ([("a", "b", 0.9), ("b", "c", 0.1)], [("a", "c", -0.2)])
    assert (format_budget_share(20.0), format_budget_share(0.5)) == ("0.10 %", "< 0.01 %")


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A browser for all tests."""
    if CHROMIUM is None:
        pytest.skip("no Chromium on the PATH to open the page in")
    with open_browser(tmp_path_factory.mktemp("home")) as found:
        yield found


@pytest.fixture
def html(tmp_path: Path, reader: Browser) -> Path:
    """The page of some products, one with a hostile name; the browser has said nothing yet."""
    reader.said.clear()
    path = tmp_path / "cycle.html"
    path.write_text(render_cycle_page(draw_turn(PRODUCTS)), encoding="utf-8")
    return path


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_draws_itself_at_every_width(html: Path, reader: Browser, scheme: str) -> None:
    """Nothing runs out of the side, every chart and the map are there, names stay text, the console stays empty."""
    for width in (360, 390, 1400):
        reader.open(html, width, scheme)
        assert reader.value("document.documentElement.scrollWidth <= document.documentElement.clientWidth"), width
        assert (
            reader.value("[...document.querySelectorAll('.fans canvas')].map((c) => c.clientWidth > 200)") == [True] * 3
        )
        assert reader.value("document.getElementById('map').clientWidth") > 100
        assert find_faint_text(reader) == []
    assert "quantiles of 10 % to 90 %" in reader.value("document.querySelector('.key').textContent")
    assert reader.value("document.images.length") == 0
    assert reader.said == []


def test_a_step_shows_the_same_scenario_everywhere(html: Path, reader: Browser) -> None:
    """Forward, backward around the end, to the highest: number, slider and every chart go together."""
    shown = "[document.getElementById('which').textContent, document.getElementById('scenario').value]"
    pixels = "[...document.querySelectorAll('.fans canvas')].map((c) => c.toDataURL())"
    settled = "new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))"
    reader.open(html)
    before = reader.value(pixels)
    reader.value("document.getElementById('on').click()")
    reader.value(settled)
    assert reader.value(shown) == ["2", "2"]
    assert all(one != other for one, other in zip(before, reader.value(pixels), strict=True))
    reader.value("document.getElementById('back').click(), document.getElementById('back').click()")
    assert reader.value(shown) == ["30", "30"]
    reader.value("document.getElementById('highest').click()")
    dearest = draw_turn(PRODUCTS).turns[0].scenarios[:, 0].mean(axis=1).argmax()
    assert reader.value("document.getElementById('highest').textContent") == "highest a/energy"
    assert reader.value(shown) == [str(dearest + 1)] * 2
    assert reader.said == []


def test_pointing_at_the_map_names_the_pair(html: Path, reader: Browser) -> None:
    """The cell under the pointer reads as its two products and their correlation."""
    reader.open(html)
    reader.point(
        "(() => { const map = document.getElementById('map'); map.scrollIntoView();"
        " const at = map.getBoundingClientRect(); return [at.right - 5, at.bottom - 5]; })()"
    )
    reader.value("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    assert reader.value("document.getElementById('cell').textContent") == "b/energy and b/energy: 1.00"

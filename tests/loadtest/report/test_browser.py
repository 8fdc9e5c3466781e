"""The report as a reader sees it, in a real browser: light and dark, narrow and wide."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from loadtest.report import render_page
from tests.loadtest import runs
from tests.loadtest.browser import CHROMIUM, Browser, open_browser
from tests.loadtest.contrast import find_faint_text

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH to open the report in")

EVIL = """<img src=x onerror=alert(1)></script><script>alert(2)</script>"'"""
PAGES: dict[str, tuple[Sequence[dict[str, Any]], Sequence[str]]] = {
    "one": ([runs.record()], ["one.json"]),
    "two": ([runs.record(), runs.record(1, seconds=95, slow=1.6)], ["before.json", "after-a-change.json"]),
    "ramp": ([runs.make_ramp()], ["ramp.json"]),
    "bare": ([runs.make_bare()], ["bare.json"]),
    "hostile": ([runs.make_hostile(EVIL), runs.make_hostile("w" * 300)], [EVIL, "w" * 300]),
}
# The pixels of a chart. A copy is read: reading the original twice makes the browser warn about its own speed.
PIXELS = """const pixels = (canvas) => {
  const copy = new OffscreenCanvas(canvas.width, canvas.height).getContext("2d", { willReadFrequently: true });
  copy.drawImage(canvas, 0, 0);
  const all = copy.getImageData(0, 0, canvas.width, canvas.height).data;
  return Array.from({ length: all.length / 4 }, (_, i) => all.subarray(4 * i, 4 * i + 4));
};"""
# How many pixels of each chart are coloured: axes, grid and words are grey.
MARKS = f"""(() => {{ {PIXELS}
  const coloured = ([r, g, b, opaque]) => opaque > 99 && Math.max(r, g, b) - Math.min(r, g, b) > 60;
  return [...document.querySelectorAll(".plot canvas")].map((canvas) => pixels(canvas).filter(coloured).length);
}})()"""
# The first colour, and how many pixels of the first chart have exactly that.
FIRST_HUE = f"""(() => {{ {PIXELS}
  const hue = getComputedStyle(document.documentElement).getPropertyValue("--hue0").trim().slice(1);
  const [r, g, b] = [0, 2, 4].map((i) => parseInt(hue.slice(i, i + 2), 16));
  const same = (pixel) => pixel[0] === r && pixel[1] === g && pixel[2] === b;
  return [hue, pixels(document.querySelector(".plot canvas")).filter(same).length];
}})()"""
# What each chart's legend reads, once the first reads a value.
READ = """new Promise((done) => (function look() {
  const texts = (plot) => [...plot.querySelectorAll(".u-value")].map((value) => value.textContent);
  const shown = [...document.querySelectorAll(".plot")].map(texts);
  /[0-9]/.test(shown[0][0]) ? done(shown) : requestAnimationFrame(look);
})())"""
ROWS = "[...document.querySelector('figure details table').rows].map((row) => [...row.cells].map((c) => c.textContent))"
DRAWN = "new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))"


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A browser for all tests: starting one takes a second."""
    with open_browser(tmp_path_factory.mktemp("home")) as found:
        yield found


@pytest.fixture
def report(request: pytest.FixtureRequest, reader: Browser, tmp_path: Path) -> Path:
    """The page of the test's parameter as a file; the browser has said nothing yet."""
    reader.said.clear()
    path = tmp_path / "report.html"
    path.write_text(render_page(*PAGES[request.param]), encoding="utf-8")
    return path


@pytest.mark.parametrize("report", PAGES, indirect=True)
def test_every_width_shows_every_chart(reader: Browser, report: Path) -> None:
    """From a telephone to a wall: nothing runs out of the side, every chart has marks, the console stays empty."""
    for width in (360, 1600, 2560):
        reader.open(report, width)
        assert reader.value("document.documentElement.scrollWidth <= document.documentElement.clientWidth"), width
        assert reader.value("[...document.querySelectorAll('canvas')].every((c) => c.clientWidth > 250)"), width
        marks = reader.value(MARKS)
        assert len(marks) == reader.value("document.querySelectorAll('figure').length") > 0
        assert min(marks) > 15, (width, marks)
    assert reader.said == []


@pytest.mark.parametrize("report", ["two"], indirect=True)
def test_colours_follow_the_reader(reader: Browser, report: Path) -> None:
    """Charts too are drawn in the colours of light or dark, when opened and when the reader changes their mind."""
    reader.open(report, scheme="light")
    light, light_pixels = reader.value(FIRST_HUE)
    reader.prefer("dark")
    reader.value(DRAWN)
    dark, dark_pixels = reader.value(FIRST_HUE)
    assert light != dark
    assert min(light_pixels, dark_pixels) > 20
    reader.open(report, scheme="dark")
    assert reader.value(FIRST_HUE) == [dark, dark_pixels]
    assert reader.said == []


@pytest.mark.parametrize("report", ["two"], indirect=True)
def test_a_telephone_reads_it_light_and_dark(reader: Browser, report: Path) -> None:
    """Every text stands out from its ground, and the tables of two runs do not scroll sideways."""
    for scheme in ("light", "dark"):
        reader.open(report, 390, scheme)
        assert find_faint_text(reader) == []
        assert reader.value("document.documentElement.scrollWidth <= 390")
        tables = "[...document.querySelectorAll('.tables .scroll')]"
        assert reader.value(f"{tables}.filter((each) => each.scrollWidth > each.clientWidth + 1).length") == 0


@pytest.mark.parametrize("report", ["two"], indirect=True)
def test_printing_is_light_and_fits(reader: Browser, report: Path) -> None:
    """A dark screen prints dark on white, at the width of paper, and is dark again afterwards."""
    reader.open(report, scheme="dark")
    dark, _ = reader.value(FIRST_HUE)
    reader.value("dispatchEvent(new Event('beforeprint'))")
    reader.value(DRAWN)
    printed, pixels = reader.value(FIRST_HUE)
    assert printed != dark
    assert pixels > 20
    assert reader.value("Math.max(...[...document.querySelectorAll('canvas')].map((c) => c.clientWidth))") <= 640
    reader.value("dispatchEvent(new Event('afterprint'))")
    reader.value(DRAWN)
    assert reader.value(FIRST_HUE)[0] == dark


@pytest.mark.parametrize("report", ["one"], indirect=True)
def test_pointing_at_a_chart_reads_its_values(reader: Browser, report: Path) -> None:
    """The legend shows what the table behind the chart says for that second, and the other charts' too."""
    reader.open(report)
    reader.point(
        "(() => { const at = document.querySelector('.u-over').getBoundingClientRect();"
        " return [at.x + at.width / 2, at.y + at.height / 2]; })()"
    )
    shown = reader.value(READ)
    rows = reader.value(ROWS)
    row = next(row for row in rows if row[0] == shown[0][0])
    assert [float(v) for v in shown[0]] == pytest.approx([float(v) for v in row], rel=0.01)
    assert shown[2][0] == shown[0][0]


@pytest.mark.parametrize("report", ["hostile"], indirect=True)
def test_hostile_names_make_no_elements(reader: Browser, report: Path) -> None:
    """The page's own script puts names into legends: as text."""
    reader.open(report)
    assert reader.value("document.images.length + document.querySelectorAll('iframe, object, embed').length") == 0
    assert reader.value("document.scripts.length") == 2
    assert EVIL in reader.value("document.querySelector('.charts').innerText")
    assert reader.said == []

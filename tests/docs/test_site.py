"""The pages of docs/ as a site: built strictly, read from a file without a network, and searched there."""

import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.loadtest.browser import CHROMIUM, Browser, open_browser
from tests.patience import PATIENCE_S, wait_until

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
#: Attributes by which a browser fetches something. The address of a link is only followed by its reader.
FETCHED = {("script", "src"), ("img", "src"), ("link", "href"), ("source", "src"), ("iframe", "src"), ("use", "href")}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site."""
    folder = tmp_path_factory.mktemp("site")
    build(ROOT, folder)
    return folder


def build(root: Path, folder: Path) -> str:
    """Build the site of a checkout strictly, and return what was said. Raises CalledProcessError where that fails."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", str(root / "mkdocs.yml")]
    done: subprocess.CompletedProcess[str] = subprocess.run(
        [*command, "--site-dir", str(folder)], capture_output=True, text=True, check=True, timeout=PATIENCE_S
    )
    return done.stderr


class Assets(HTMLParser):
    """The addresses that a page would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note what the tag fetches; the page's own address (`canonical`) is not fetched."""
        if dict(attrs).get("rel") == "canonical":
            return
        self.found += [value or "" for name, value in attrs if (tag, name) in FETCHED]


def list_assets(page: Path) -> list[str]:
    """The addresses that a page would fetch."""
    reader = Assets()
    reader.feed(page.read_text())
    return reader.found


def test_no_page_asks_the_network(site: Path) -> None:
    """Scripts, styles, pictures and icons lie beside the pages, and styles name nothing of elsewhere."""
    pages = [page for page in site.rglob("*.html") if page.name != "404.html"]
    assert len(pages) > 50
    for page in pages:
        for asset in list_assets(page):
            assert not re.match(r"(https?:)?//", asset), f"{page.name} fetches {asset}"
            assert asset.startswith("data:") or (page.parent / asset.partition("?")[0]).exists(), (page.name, asset)
    for style in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import )['\"]?(https?:)?//", style.read_text()), style.name


def test_what_is_broken_fails_the_build(tmp_path: Path) -> None:
    """A page that `nav` does not name, a link to a page that is not there, and one to a heading that is not."""
    settings = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[0]
    (tmp_path / "mkdocs.yml").write_text(f"{settings}\nnav:\n  - Home: index.md\n")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("# Home\n\n[gone](nowhere.md) and [gone](#nothing)\n")
    (tmp_path / "docs" / "orphan.md").write_text("# Not in the navigation\n")
    with pytest.raises(subprocess.CalledProcessError) as failed:
        build(tmp_path, tmp_path / "site")
    for complaint in ("orphan.md", "nowhere.md", "#nothing"):
        assert complaint in failed.value.stderr


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A browser for all tests: starting one takes a second."""
    if CHROMIUM is None:
        pytest.skip("needs Chromium")
    with open_browser(tmp_path_factory.mktemp("home")) as found:
        yield found


@pytest.mark.parametrize("width", [390, 1400])
def test_pages_fit_and_fetch_nothing(site: Path, browser: Browser, width: int) -> None:
    """Text, tables and blocks of code fit the window, on a phone too; only files beside the page are asked for."""
    del browser.requested[:], browser.said[:]
    for name in ("index", "get-started", "security", "reference/errors", "reference/settings"):
        browser.open(site / f"{name}.html", width, "dark" if width == 390 else "light")
        assert browser.value("document.documentElement.scrollWidth") <= width, name
    assert browser.requested
    assert not [url for url in browser.requested if not url.startswith(("file:", "data:", "blob:"))]
    assert not [each for each in browser.said if "exceptionDetails" in each]


def test_the_search_works_from_a_file(site: Path, browser: Browser) -> None:
    """A reader who types finds the page, without a server."""
    browser.open(site / "index.html", 1400)
    browser.value(
        """(() => { const field = document.querySelector(".md-search__input"); field.focus();
        field.value = "quarantine";
        field.dispatchEvent(new Event("input", {bubbles: true})); field.dispatchEvent(new Event("keyup")); })()"""
    )
    found = "[...document.querySelectorAll('.md-search-result__link')].map((link) => link.href).join(' ')"
    wait_until(lambda: "runbooks/quarantine.html" in browser.value(found), "the page is found")


def test_readme_is_one_screen_and_its_links_lead_somewhere() -> None:
    """What it is, two commands, one figure, and links to pages and files that are there."""
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 60
    assert text.count("![") == 1
    assert re.findall(r"^make (\w+) ", text, re.MULTILINE) == ["run", "test"]
    links = re.findall(r"\]\((?!http)([^)#]+)\)", text)
    assert len(links) > 20
    assert not [link for link in links if not (ROOT / link).exists()]
    assert (ROOT / "docs" / "fleetcast.svg").stat().st_size < 200_000

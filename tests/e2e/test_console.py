"""The operators' page in a browser: it shows what the server does, acts on models, takes nothing from elsewhere."""

import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.e2e.models import FORECAST_TCN, pack_forecaster
from tests.e2e.server import Server, run_server, upload
from tests.loadtest.browser import CHROMIUM, Browser, open_browser
from tests.s3 import S3Server

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH to open the page in"),
]

FORECASTER, ODD = "au/nsw1.mar", 'x/<img src=y onerror="document.title=1">&.mar'
MANY = 40  #: models, so that not all of them are in sight
#: Waits in the page for what an expression gives, and resolves to it: the page's own requests take their time.
WAIT = "new Promise((done) => (function look() { const found = %s; found ? done(found) : setTimeout(look, 50); })())"
ROWS = "[...document.querySelectorAll('#rows button')].map((each) => each.dataset.model)"


@pytest.fixture(scope="module")
def house(s3: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A worker, models in its memory, and one that cannot be loaded."""
    bucket = s3.bucket()
    small = [pack_forecaster(f"many/{i:02}.mar", i) for i in range(MANY)]
    models = [pack_forecaster(FORECASTER, 90, config=FORECAST_TCN, forecast=True), pack_forecaster(ODD, 91), *small]
    upload(s3, bucket, [*models, replace(models[0], name="bad.mar", data=b"no archive")])
    with run_server(s3, tmp_path_factory.mktemp("house"), f"s3://{bucket}", workers=1, fronts=1) as server:
        for model in models:
            server.ask(model.question(0))
        server.fleet("load", "bad.mar")
        yield server


def show(page: Browser, server: Server, width: int = 1280, scheme: str = "light") -> None:
    """Open the page and wait until it has listed the models and drawn its charts."""
    page.open(f"{server.addresses['management']}/", width, scheme)
    page.value(WAIT % "document.querySelectorAll('#rows .row').length && document.querySelector('#charts svg')")


def click(page: Browser, text: str) -> None:
    """Press a button of the dialog by its words."""
    buttons = "[...document.querySelectorAll('dialog button')]"
    page.value(f"{buttons}.find((each) => each.textContent === {json.dumps(text)}).click()")


def wait_for_outcome(page: Browser, beginning: str) -> str:
    """What the dialog says of an action, once that begins so."""
    outcome = "document.getElementById('outcome').textContent"
    found: str = page.value(WAIT % f"{outcome}.startsWith({json.dumps(beginning)}) && {outcome}")
    return found


def test_the_page_shows_the_fleet(house: Server, tmp_path: Path) -> None:
    """Charts, processes, failures and models; rows out of sight are no elements; names are text, never markup."""
    with open_browser(tmp_path) as page:
        show(page, house)
        assert page.value("document.querySelectorAll('#charts figure').length") >= 8
        assert page.value("document.getElementById('processes').textContent").startswith("worker 0up")
        assert "bad.mar" in page.value("document.getElementById('failures').textContent")
        assert page.value("document.getElementById('count').textContent").startswith(f"{MANY + 3} of {MANY + 3} models")
        names = page.value(ROWS)
        assert names[:2] == [FORECASTER, "bad.mar"]
        assert len(names) < MANY
        page.value("document.getElementById('grid').scrollTop = 1e6")
        assert page.value(WAIT % f"{ROWS}.includes({json.dumps(ODD)}) && {ROWS}")[-1] == ODD
        assert page.value("document.querySelectorAll('img').length") == 0
        assert page.value("document.title") == "Fleetcast"
        assert not page.said, page.said
        assert all(each.startswith(house.addresses["management"]) for each in page.requested)
        heads = page.value("[...document.querySelectorAll('#heads button')].map((each) => each.textContent)")
        assert {"errors", "loaded from", "load, ms", "loaded ago", "version", "workers"} <= set(heads)
        cells = page.value(
            "[...document.getElementById('rows').lastElementChild.children].map((each) => each.textContent)"
        )
        row = dict(zip([each.removesuffix(" \u2191") for each in heads], cells, strict=True))
        assert (row["model"], row["loaded from"], row["answers"]) == (ODD, "store", "1")
        assert float(row["load, ms"].replace(",", "")) > 0
    management = house.addresses["management"]
    assert len(house.http.get(f"{management}/fleet/overview").content) < 16_384, "asked every four seconds"
    listing = house.http.get(f"{management}/fleet/models", params={"limit": str(MANY)})
    assert len(listing.content) / MANY < 1_024, "of a model"


def test_models_are_found_sorted_and_reached_by_keys(house: Server, tmp_path: Path) -> None:
    """The search narrows, a column's head sorts, arrow keys go from row to row."""
    with open_browser(tmp_path) as page:
        show(page, house)
        page.value("document.querySelector('#heads button').click()")
        assert page.value(ROWS)[0] == ODD
        page.value("""(() => { const search = document.getElementById("search");
          search.value = "MANY/0"; search.dispatchEvent(new Event("input", { bubbles: true })); })()""")
        assert page.value(ROWS) == [f"many/{i:02}.mar" for i in range(9, -1, -1)]
        page.value("document.getElementById('grid').focus()")
        for _ in range(3):
            page.call("Input.dispatchKeyEvent", type="keyDown", key="ArrowDown", code="ArrowDown")
        assert page.value("document.activeElement.dataset.model") == "many/07.mar"


def test_a_model_is_pinned_tried_and_unloaded(house: Server, tmp_path: Path) -> None:
    """Each action says what the server said; a forecast is drawn as a fan, and a wrong request says where."""
    with open_browser(tmp_path) as page:
        show(page, house)
        page.value(
            f"[...document.querySelectorAll('#rows button')].find((b) => b.dataset.model === '{FORECASTER}').click()"
        )
        page.value(WAIT % "document.getElementById('body').value")
        click(page, "Pin")
        assert '"pinned":true' in wait_for_outcome(page, "Pin: done")
        assert house.models()[FORECASTER]["pinned"]
        page.value(WAIT % "document.getElementById('model-state').textContent.endsWith('pinned')")
        click(page, "Unpin")
        wait_for_outcome(page, "Unpin: done")
        click(page, "Ask the model")
        wait_for_outcome(page, "Answered after ")
        assert page.value("document.querySelectorAll('#fan .band').length") == 1
        page.value('document.getElementById(\'body\').value = \'{"instances": [{"start": "x", "target": [1]}]}\'')
        click(page, "Ask the model")
        assert "expected YYYY-MM-DD" in wait_for_outcome(page, "instances[0].start: ")
        click(page, "Unload")
        wait_for_outcome(page, "Unload: done")
        assert FORECASTER not in house.resident()
        click(page, "Load")
        wait_for_outcome(page, "Load: done")
        assert FORECASTER in house.resident()


#: How light a colour is, by the formula of WCAG 2.2 (https://www.w3.org/TR/WCAG22/#dfn-relative-luminance).
LIGHT = """((element, name) => getComputedStyle(element)[name].match(/[0-9.]+/g).slice(0, 3)
  .map((each) => each / 255).map((c) => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
  .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0))"""


def test_the_page_fits_its_window(house: Server, tmp_path: Path) -> None:
    """Nothing is wider, from telephones to large screens; text stands out by 4.5 to 1, light and dark."""
    with open_browser(tmp_path) as page:
        for width, scheme in itertools.product((360, 1280, 2560), ("light", "dark")):
            show(page, house, width, scheme)
            assert page.value("document.documentElement.scrollWidth") <= width
            ground = page.value(f"{LIGHT}(document.body, 'backgroundColor')")
            for what in ("h2", "label", ".row button", ".bad"):
                ink = page.value(f"{LIGHT}(document.querySelector('{what}'), 'color')")
                high, low = max(ink, ground), min(ink, ground)
                assert (high + 0.05) / (low + 0.05) >= 4.5, (what, width, scheme)

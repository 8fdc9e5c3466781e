"""The console with 5,000 models, in a real browser: what it asks for, and what it keeps in the document.

The answers are made up: 5,000 resident models take minutes to load, and the page sees no more of them than this.
`tests/e2e/test_console.py` has the page of a real server.
"""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from server.supervisor.console import routes
from tests.loadtest.browser import CHROMIUM, Browser, open_browser
from tests.patience import wait_until

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH to open the page in")

MODELS = 5_000
MOST_ROWS = 60  #: in the document: 640 pixels of rows of 35, and a dozen above and below
FOLDER = Path(routes.__file__).parent
BUCKETS = {"bounds": [0.001], "counts": [10, 10], "sum": 0.1}


def make_row(i: int) -> dict[str, object]:
    """A resident model as the management API lists it."""
    usage = {"answers": i, "failures": 0, "last_ms": 0}
    held = {"worker": 0, "version": "18620d-18ecd-5f", "state": "ready", "bytes": 8192, "usage": usage}
    return {
        "model": f"au/m{i:04}.mar",
        "pinned": False,
        "holders": [{**held, "family": "mlp:1", "leases": 0, "loaded_s_ago": 60.5, "used_s_ago": 1.25}],
    }


class FleetAnswers:
    """What a server of many models would answer. `asked` has the paths of all requests, `events` what has happened."""

    def __init__(self) -> None:
        self.rows = [make_row(i) for i in range(MODELS)]
        self.asked: list[str] = []
        self.events = 0
        self._time = 1_000.0

    def answer(self, target: str) -> tuple[str, bytes]:
        """The media type and the body for a path with a query."""
        url = urlsplit(target)
        self.asked.append(url.path)
        if url.path == "/fleet/overview":
            return "application/json", json.dumps(self._overview()).encode()
        if url.path == "/fleet/models":
            query = parse_qs(url.query)
            after, limit = query.get("after", [""])[0], int(query["limit"][0])
            left = [row for row in self.rows if str(row["model"]) > after]
            more = left[limit - 1]["model"] if len(left) > limit else None
            return "application/json", json.dumps({"models": left[:limit], "next_after": more}).encode()
        name = url.path.removeprefix("/console/").lstrip("/") or "console.html"
        kind = {"console.html": "text/html", **routes.FILES}[name]
        return kind, (FOLDER / name).read_bytes()

    def _overview(self) -> dict[str, object]:
        self._time += 2
        counted = {"requests": {"200": self.events}, "cache_requests": {"hit": self.events}}
        empty = ("cache_bytes", "cache_capacity_bytes", "evictions", "load_failures", "loads_under_way", "swaps")
        return {
            **counted,
            **{name: {} for name in empty},
            "at": self._time, "store": "s3://models", "version": "0", "ready": True, "under_way": {},
            "loaded_models": {"0": MODELS}, "quarantined_models": {}, "request_seconds": BUCKETS, "batch_rows": BUCKETS,
            "load_seconds": {"store": BUCKETS},
            "processes": [{"kind": "worker", "index": 0, "up": True, "device": "cpu", "incarnation": 1, "pid": 2}],
        }  # fmt: skip


@contextmanager
def serve_answers(fleet: FleetAnswers) -> Iterator[str]:
    """The address of a listener on loopback that gives these answers."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            kind, body = fleet.answer(self.path)
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Nothing is printed."""

    listener = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=listener.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.server_address[1]}/"
    finally:
        listener.shutdown()
        thread.join()
        listener.server_close()


def wait_for(page: Browser, condition: str) -> None:
    """Wait in the page until an expression is true."""
    page.value(f"new Promise((done) => (function look() {{ {condition} ? done(true) : setTimeout(look, 20); }})())")


# The page's clock is the test's: fifteen seconds pass without anybody waiting for them.
CLOCK = """(() => {
  const now = performance.now.bind(performance);
  window.ahead = 0;
  performance.now = () => now() + window.ahead;
})()"""


@pytest.mark.slow
def test_thousands_of_models_are_few_rows_and_few_listings(tmp_path: Path) -> None:
    """Through the whole table only rows in sight are elements, in their order, and each model has its place.

    Models are listed once, in pages, and again when something has happened to them and enough time has passed.
    """
    fleet = FleetAnswers()
    with serve_answers(fleet) as address, open_browser(tmp_path) as page:
        page.call("Page.addScriptToEvaluateOnNewDocument", source=CLOCK)
        page.open(address)
        wait_for(page, "document.querySelectorAll('#rows .row').length")
        listing = -(-MODELS // 1000)
        assert fleet.asked.count("/fleet/models") == listing
        rows = page.value("""(async () => {
          const grid = document.getElementById("grid"), found = [];
          for (let at = 0; at <= 40; at++) {
            grid.scrollTop = (grid.scrollHeight - grid.clientHeight) * at / 40;
            for (let frame = 0; frame < 3; frame++) await new Promise(requestAnimationFrame);
            found.push([...document.querySelectorAll("#rows button")].map((each) => each.dataset.model));
          }
          return found;
        })()""")
        assert max(map(len, rows)) <= MOST_ROWS
        assert all(each == sorted(each) for each in rows)
        assert (rows[0][0], rows[-1][-1]) == ("au/m0000.mar", f"au/m{MODELS - 1:04}.mar")
        assert page.value("document.querySelector('#rows').lastElementChild.ariaRowIndex") == str(MODELS + 1)

        page.value("window.ahead = 100000")  # more than 15 ms for each model
        wait_for(page, "[...document.querySelectorAll('#rows .row')].at(-1).textContent.includes('1 min')")
        assert fleet.asked.count("/fleet/models") == listing, "nothing has happened, so that nothing is listed"
        fleet.events += 1
        wait_until(lambda: fleet.asked.count("/fleet/models") == 2 * listing, "a listing after an event")
        assert not page.said, page.said

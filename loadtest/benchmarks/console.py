"""What a viewer of the operators' page costs the server, and whether thousands of models scroll without a stutter.

fleetcast-load bench console            5,000 resident models, one viewer; needs Chromium

A server holds the models and answers a request a second, so that the page has something to follow. Spans with the page
open in a headless Chromium alternate with spans without: the viewer costs the difference of the processor time of all
processes of the server. Then the page scrolls through its whole table, one step a frame, while the times between frames
and the longest tasks are noted. On a machine with few cores the browser takes its time from the server's, which frames
show and processor time hardly does. Everything runs on loopback. Saves a record, and exits with 1 when a viewer costs a
hundredth of a core or more.
"""

import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Annotated

import orjson
import typer
import urllib3
from rich.console import Console

from loadtest import flags, record
from loadtest.fleets.fleet import Fleet, list_fleet_names, write_fleet
from loadtest.fleets.network_shape import make_request
from loadtest.fleets.synthetic_archives import build_network
from loadtest.observe.browser import Browser, open_browser
from loadtest.observe.local_server import LocalServer, run_local_server
from loadtest.observe.resource_counts import list_pids, read_cpu_seconds
from model_store.errors import LoadError
from server.contract import HEADER_TARGET_MODEL, INVOCATIONS_PATH
from server.shell.progress import TaskList, follow_tasks

LIMIT = 0.01  #: of a core that a viewer may cost
FAMILY = "mlp-64"
SLAB_ROWS = 100
REST_S = 3.0  #: after a page was opened or closed, before its span begins
LATE_MS = 50.0  #: between two frames: a stutter that a reader sees, three frames of 60 a second
#: Scrolls through the table in so many steps, one a frame: times between frames and long tasks, in ms, and most rows.
SCROLL = """new Promise((done) => {
  const grid = document.getElementById("grid"), between = [], tasks = [], steps = %d;
  new PerformanceObserver((list) => tasks.push(...list.getEntries().map((each) => each.duration)))
    .observe({ type: "longtask", buffered: false });
  let at = 0, before = performance.now(), rows = 0;
  const move = (now) => {
    between.push(now - before);
    before = now;
    rows = Math.max(rows, document.querySelectorAll("#rows .row").length);
    grid.scrollTop = (grid.scrollHeight - grid.clientHeight) * ++at / steps;
    if (at < steps) requestAnimationFrame(move); else setTimeout(() => done([between.slice(1), tasks, rows]), 200);
  };
  requestAnimationFrame(move);
})"""

console = Console(highlight=False, width=None if sys.stdout.isatty() else 110)
app = typer.Typer(add_completion=False, rich_markup_mode=None)


@dataclass(frozen=True, slots=True)
class ViewerSpan:
    """A span of a quiet server: its length, the processor seconds by process, and the bytes that a viewer was sent."""

    viewer: bool
    seconds: float
    cpu_s: dict[str, float]
    received: int

    @property
    def share(self) -> float:
        """The share of a core."""
        return sum(self.cpu_s.values()) / self.seconds


@dataclass(frozen=True, slots=True)
class Scroll:
    """How the page scrolled: milliseconds between frames and of tasks over 50 ms, and most rows in the document."""

    frames: int
    median_ms: float
    p99_ms: float
    worst_ms: float
    late: int  #: frames that came LATE_MS or more after the one before
    long_tasks_ms: list[float]
    most_rows: int


@app.command()
def main(
    *,
    models: Annotated[int, typer.Option(min=10, help="number of resident models")] = 5_000,
    seconds: Annotated[float, typer.Option(min=5, help="duration of a span")] = 150.0,
    spans: Annotated[int, typer.Option(min=1, help="number of spans with a viewer, and without")] = 2,
    seed: flags.Seed = 0,
    keep: flags.KeepRecord = True,
) -> None:
    """Measure what a viewer of the console costs, and how its table scrolls."""
    before = record.describe_machine()
    try:
        with tempfile.TemporaryDirectory(prefix="fleetcast-console-") as folder, follow_tasks() as tasks:
            found, scroll = run_stages(models, seconds, spans, seed, Path(folder), tasks)
    except (RuntimeError, ValueError, OSError, urllib3.exceptions.HTTPError, LoadError) as error:
        raise SystemExit(f"no verdict: {error}") from error
    cost = compute_viewer_cost(found)
    _show_findings(models, found, scroll, cost)
    if keep:
        results = {
            "models": models,
            "viewer_share_of_a_core": cost,
            "limit": LIMIT,
            "spans": [{**asdict(each), "share": each.share} for each in found],
            "scroll": asdict(scroll),
        }
        console.print(f"record: {record.save_record('console', seed, before, results)}")
    raise SystemExit(cost >= LIMIT)


def run_stages(
    models: int, seconds: float, spans: int, seed: int, folder: Path, tasks: TaskList
) -> tuple[list[ViewerSpan], Scroll]:
    """Make the fleet, hold it, watch it. Raises what the server, the store and the browser raise."""
    store = folder / "store"
    write_fleet(Fleet(1, seed, {FAMILY: 1.0}), str(store), tasks)
    link_archives(store, models)
    slab = SLAB_ROWS * build_network(FAMILY).family.row_floats * 4
    cache = slab * (-(-models // SLAB_ROWS) + 1)
    sizes = ["--workers", "1", "--slab-bytes", str(slab), "--model-cache-bytes", str(cache)]
    with run_local_server(str(store), sizes) as server:
        load_models(server, models, tasks)
        task = tasks.start_task("spans", 2 * spans)
        found = []
        for _ in range(spans):
            for viewer in (False, True):
                found.append(measure_span(server, seconds, folder / "browser", viewer=viewer))
                task.advance()
        with open_browser(folder / "browser") as page:
            show_models(page, server)
            return found, summarise_scroll(*page.value(SCROLL % max(100, models // 8)))


def link_archives(store: Path, models: int) -> None:
    """Give the only archive of a store all names of a fleet: what models weigh and list does not depend on numbers."""
    first, *others = list_fleet_names(models)
    for name in others:
        (store / name).parent.mkdir(parents=True, exist_ok=True)
        os.link(store / first, store / name)


def load_models(server: LocalServer, models: int, tasks: TaskList) -> None:
    """Load all models by the management API. Raises RuntimeError if not all are resident afterwards."""
    task = tasks.start_task("loads", models)
    with urllib3.PoolManager() as pool:
        for name in list_fleet_names(models):
            reply = pool.request("POST", f"{server.management}/fleet/load/{name}")
            if reply.status != 200:  # noqa: PLR2004
                raise RuntimeError(f"{name} was not loaded: {reply.data[:300]!r}")
            task.advance()
    if (held := server.loaded_models()) != models:
        raise RuntimeError(f"{held} of {models} models are resident")


def measure_span(server: LocalServer, seconds: float, home: Path, *, viewer: bool) -> ViewerSpan:
    """Measure a span, with the page open in a browser or without one."""
    if not viewer:
        time.sleep(REST_S)
        return _measure(server, seconds)
    with open_browser(home) as page:
        show_models(page, server)
        page.value(f"new Promise((done) => setTimeout(done, {1000 * REST_S}))")
        return _measure(server, seconds, page)


@contextmanager
def ask_each_second(server: LocalServer) -> Iterator[None]:
    """Send a request a second for the first model, on a thread, until the block ends."""
    ended, body = threading.Event(), orjson.dumps(make_request(0))
    headers = {"Content-Type": "application/json", HEADER_TARGET_MODEL: list_fleet_names(1)[0]}

    def ask() -> None:
        with urllib3.PoolManager() as pool:
            while not ended.wait(1):
                pool.request("POST", f"{server.inference}{INVOCATIONS_PATH}", body=body, headers=headers)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def show_models(page: Browser, server: LocalServer) -> None:
    """Open the page and wait until it lists models."""
    page.open(f"{server.management}/")
    page.value("""new Promise((done) => (function look() {
      document.querySelectorAll("#rows .row").length ? done() : setTimeout(look, 50); })())""")


def _measure(server: LocalServer, seconds: float, page: Browser | None = None) -> ViewerSpan:
    pids = {"supervisor": server.process.pid, **list_pids(server)}
    before, began = {name: read_cpu_seconds(pid) for name, pid in pids.items()}, time.monotonic()
    received = page.received if page is not None else 0
    with ask_each_second(server):
        if page is None:
            time.sleep(seconds)
        else:  # the browser's messages are read meanwhile
            page.value(f"new Promise((done) => setTimeout(done, {1000 * seconds}))")
    spent = {name: read_cpu_seconds(pid) - before[name] for name, pid in pids.items()}
    more = page.received - received if page is not None else 0
    return ViewerSpan(page is not None, time.monotonic() - began, spent, more)


def summarise_scroll(between: list[float], tasks: list[float], rows: int) -> Scroll:
    """Sum up the times between frames, in ms."""
    ordered = sorted(between)
    return Scroll(
        frames=len(between),
        median_ms=median(between),
        p99_ms=ordered[int(0.99 * (len(ordered) - 1))],
        worst_ms=ordered[-1],
        late=sum(each >= LATE_MS for each in between),
        long_tasks_ms=tasks,
        most_rows=rows,
    )


def compute_viewer_cost(spans: list[ViewerSpan]) -> float:
    """The median share of a core with a viewer, less that without."""
    return median(each.share for each in spans if each.viewer) - median(each.share for each in spans if not each.viewer)


def _show_findings(models: int, spans: list[ViewerSpan], scroll: Scroll, cost: float) -> None:
    for each in spans:
        console.print("  ".join(_describe_span(each)))
    console.print(f"{models:,} models: a viewer costs {cost:.2%} of a core (limit {LIMIT:.0%})")
    console.print(
        f"scrolling: {scroll.frames} frames, {scroll.median_ms:.1f} ms between two (99 % within {scroll.p99_ms:.1f}, "
        f"worst {scroll.worst_ms:.1f}), {scroll.late} later than {LATE_MS:g} ms, "
        f"{len(scroll.long_tasks_ms)} tasks over 50 ms, at most {scroll.most_rows} rows in the document"
    )


def _describe_span(span: ViewerSpan) -> Iterator[str]:
    yield f"{'viewer' if span.viewer else 'nobody'}: {span.share:.2%} of a core"
    yield ", ".join(f"{name} {seconds:.2f} s" for name, seconds in span.cpu_s.items())
    if span.viewer:
        yield f"{span.received / span.seconds / 1024:.1f} KiB/s"


if __name__ == "__main__":
    app()

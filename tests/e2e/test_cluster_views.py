"""What one node of a cluster shows of all: on its page, in `fleetcast top`, and to Prometheus."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.models import pack_fleet
from tests.e2e.nodes import Nodes, run_nodes
from tests.e2e.server import PROMTOOL, ROOT, Server, upload
from tests.loadtest.browser import CHROMIUM, open_browser
from tests.patience import PATIENCE_S, wait_until
from tests.s3 import S3Server

pytestmark = pytest.mark.e2e

MODELS = pack_fleet("view", 12)
SECRET = "the operator's token of this test"
PAGE = ROOT / "docs/cluster.md"
WAIT = "new Promise((done) => (function look() { const found = %s; found ? done(found) : setTimeout(look, 50); })())"


def test_each_node_shows_all_nodes(s3: S3Server, store: str, tmp_path: Path) -> None:
    """Two nodes with tokens. Either one's management listener, `fleetcast top` and page say of both how they are and
    what they have answered; the page's scrape configuration finds both, and each series has its node's name. A node
    that is killed is lost, with the reason, and the other one's numbers stay.
    """
    upload(s3, store, MODELS)
    http = httpx.Client(headers={"Authorization": f"Bearer {SECRET}"}, timeout=PATIENCE_S, trust_env=False)
    with run_nodes(s3, tmp_path, f"s3://{store}", ("a", "b"), http=http, tokens=write_tokens(tmp_path)) as nodes:
        a, b = nodes.servers.values()
        wait_until(lambda: _ask_all(a) and _states(a) == _states(b) == {"a", "b"}, "both know what both do")
        for server in (a, b):
            found = {row["name"]: row for row in _list_nodes(server)}
            assert {row["state"] for row in found.values()} == {"here", "linked"}
            assert sum(_count_resident(row) for row in found.values()) >= len(
                MODELS
            )  # some twice: asked before the link
            assert all(row["does"]["ready"] and row["does"]["workers_up"] == 1 for row in found.values())
            assert found["b"]["management"] == b.addresses["management"]
        shown = run_top(a)
        assert re.search(r"^a +here ", shown, re.MULTILINE), shown
        assert re.search(r"^b +linked ", shown, re.MULTILINE), shown
        _look_at_the_page(a, tmp_path)
        _follow_the_scrape_configuration(nodes, tmp_path)
        os.kill(b.process.pid, signal.SIGKILL)
        b.exit_code = -signal.SIGKILL
        wait_until(lambda: _list_nodes(a)[1]["state"] == "lost", "the other node is seen to be lost")
        here, lost = _list_nodes(a)
        assert (lost["why"], lost["does"]) == ("no connection to it", None)
        assert _count_resident(here) > 0


def write_tokens(folder: Path) -> Path:
    """A file with one token that may do all."""
    file = folder / "tokens.toml"
    digest = hashlib.sha256(SECRET.encode()).hexdigest()
    file.write_text(f'[[tokens]]\nname = "all"\nsha256 = "{digest}"\nscopes = ["invoke", "manage", "metrics"]\n')
    return file


def run_top(server: Server) -> str:
    """What `fleetcast top` prints once."""
    line = [sys.executable, "-m", "server.cli.main", "top", "--once", "--interval", "1", "--no-models"]
    done = subprocess.run(
        [*line, "--url", server.addresses["management"]],
        env={**os.environ, "FLEETCAST_TOKEN": SECRET, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=False, timeout=PATIENCE_S, cwd=server.log.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def _list_nodes(server: Server) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = server.http.get(f"{server.addresses['management']}/fleet/nodes").json()["nodes"]
    return rows


def _states(server: Server) -> set[object]:
    """The nodes that say what they do."""
    return {row["name"] for row in _list_nodes(server) if row["does"]}


def _count_resident(row: dict[str, Any]) -> int:
    return int(sum(row["does"]["loaded_models"].values()))


def _ask_all(server: Server) -> bool:
    """Every model answers, some of them from the other node."""
    json_body = {"Content-Type": "application/json"}
    statuses = {server.post(model.name, model.question(1).body, json_body).status_code for model in MODELS}
    return statuses == {httpx.codes.OK} and server.total("fleetcast_forwarded_requests_total") > 0


def _look_at_the_page(server: Server, folder: Path) -> None:
    """The console has a row for each node, with numbers."""
    if CHROMIUM is None:
        return
    with open_browser(folder) as page:
        page.open(f"{server.addresses['management']}/", 1280, "light")
        page.value(f"sessionStorage.setItem('token', {json.dumps(SECRET)})")
        page.open(f"{server.addresses['management']}/?again", 1280, "light")
        texts = "[...row.children].map((cell) => cell.textContent)"
        cells = f"[...document.querySelectorAll('#nodes tr')].map((row) => {texts})"
        rows = page.value(WAIT % f"({cells}.length > 1 && {cells}.every((row) => row[6] !== '-')) && {cells}")
        assert [row[:2] for row in rows] == [["a", "here"], ["b", "linked"]]
        assert sum(int(row[6]) for row in rows) >= len(MODELS)
        assert page.value("document.getElementById('nodes-count').textContent") == "2 of 2 nodes are well"


def _follow_the_scrape_configuration(nodes: Nodes, folder: Path) -> None:
    """The one of the page, with this node's address and token: it finds all nodes, whose series say which they are."""
    (config,) = re.findall(r"```yaml[^\n]*\n(scrape_configs:.*?)```", PAGE.read_text(), re.DOTALL)
    metrics = {name: server.addresses["metrics"] for name, server in nodes.servers.items()}
    token = folder / "prometheus.token"
    token.write_text(SECRET)
    for old, new in (("http://fleetcast-nodes:8082", metrics["a"]), ("/etc/prometheus/fleetcast.token", str(token))):
        assert old in config
        config = config.replace(old, new)
    file = folder / "prometheus.yml"
    file.write_text(config)
    places = {url.partition("://")[2] for url in metrics.values()}
    if PROMTOOL is not None:
        checked = subprocess.run(
            [PROMTOOL, "check", "config", str(file)], capture_output=True, text=True, check=False, timeout=PATIENCE_S
        )
        assert checked.returncode == 0, checked.stdout + checked.stderr
        found = subprocess.run(
            [PROMTOOL, "check", "service-discovery", "--timeout=5s", str(file), "fleetcast"],
            capture_output=True, text=True, check=False, timeout=PATIENCE_S,
        )  # fmt: skip
        assert {row["labels"]["instance"] for row in json.loads(found.stdout)} == places, found.stderr
    first = nodes.servers["a"]
    (group,) = first.http.get(f"{metrics['a']}/targets").json()
    assert set(group["targets"]) == places
    assert httpx.get(f"{metrics['a']}/targets", trust_env=False).status_code == httpx.codes.UNAUTHORIZED
    for name, server in nodes.servers.items():
        lines = [line for line in server.exposition().splitlines() if line and not line.startswith("#")]
        assert len(lines) > 100
        assert [line for line in lines if f'node="{name}"' not in line] == []

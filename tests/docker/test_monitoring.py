"""Dashboard and alerts: made from the contract's names, checked by promtool, and asked of a real Prometheus.

Every query has an answer from a server at work, or is in EMPTY_IN_HEALTH with the reason why it has none.
"""

import json
import re
import shlex
import ssl
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import trustme
import yaml
from typer.testing import CliRunner

from loadtest.observe.processes import find_free_port
from server import contract
from server.cli.main import app
from server.contract import METRIC_PREFIX
from tests.docker.test_images import DOCKER, needs_prometheus, start_service
from tests.e2e.models import pack_fleet
from tests.e2e.server import Server, run_server, upload
from tests.patience import PATIENCE_S, wait_until
from tests.s3 import S3Server

ROOT = DOCKER.parent
RUNBOOKS = ROOT / "docs/runbooks"
ALERTS = DOCKER / "prometheus/alerts.yaml"
DASHBOARD = DOCKER / "grafana/dashboards/fleetcast.json"
WINDOW = "1m"  #: for Grafana's `$__rate_interval`
_COMPARISON = re.compile(r"\s(?:<|>|==)\s[\d.]+")
_SERIES = re.compile(rf"\b{METRIC_PREFIX}\w+")
EXEMPLARS = "--enable-feature=exemplar-storage"
#: Series of forecasts compared with observed prices, which this server is not given.
OF_ACTUALS = tuple(
    METRIC_PREFIX + name
    for name in ("actuals", "forecasts_kept", "paired_prices", "band_", "pinball_", "forecast_drift")
)
EMPTY_IN_HEALTH = {
    "Failed loads": "no load of this test's models fails",
}


@dataclass(frozen=True, slots=True)
class Asked:
    """A query, and the panel or alert that it is of."""

    owner: str
    expr: str


def list_alerts() -> list[dict[str, Any]]:
    """The rules."""
    groups = yaml.safe_load(ALERTS.read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def list_dashboard_queries() -> list[Asked]:
    """Every query of the dashboard, with its variables set as Grafana sets them."""
    panels = json.loads(DASHBOARD.read_text())["panels"]
    return [
        Asked(panel["title"], target["expr"].replace("$__rate_interval", WINDOW).replace("$instance", ".*"))
        for panel in panels
        for target in panel.get("targets", [])
    ]


def list_series() -> set[str]:
    """Every name that a scrape may have."""
    names = set[str]()
    for spec in contract.METRICS:
        names.add(spec.series)
        if spec.kind == "histogram":
            names |= {spec.sum, spec.count, f"{spec.series}_bucket"}
    return names


# --- by reading -------------------------------------------------------------------------------------------------------


def test_dashboard_is_what_make_docs_writes() -> None:
    """`docker/dashboard.py`, which takes names from the contract, gives the file that is there."""
    made = subprocess.run([sys.executable, DOCKER / "dashboard.py"], capture_output=True, text=True, check=True)
    assert made.stdout == DASHBOARD.read_text(), "run `make docs`"


def test_rows_are_questions_and_panels_fit_the_grid() -> None:
    """Every row asks something, every panel says what to see in it, and none lies on another."""
    panels = json.loads(DASHBOARD.read_text())["panels"]
    assert all(panel["title"].endswith("?") for panel in panels if panel["type"] == "row")
    charts = [panel for panel in panels if panel["type"] != "row"]
    assert all(panel["description"] and panel["targets"] for panel in charts)
    taken = [
        (x, y)
        for place in (panel["gridPos"] for panel in panels)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(taken) == len(set(taken))
    assert max(x for x, _ in taken) == 23


@pytest.mark.parametrize("rule", list_alerts(), ids=lambda rule: rule["alert"])
def test_an_alert_names_series_of_the_contract_and_a_runbook(rule: dict[str, Any]) -> None:
    """So that a renamed metric cannot silence an alert, and whoever is woken finds a page."""
    assert set(_SERIES.findall(rule["expr"])) <= list_series()
    page = ROOT / rule["annotations"]["runbook_url"]
    assert rule["alert"] in page.read_text(), f"{page.name} does not name {rule['alert']}"


@pytest.mark.parametrize("page", sorted(RUNBOOKS.glob("*.md")), ids=lambda page: page.stem)
def test_commands_of_a_runbook_exist(page: Path) -> None:
    """Each `fleetcast` line of its code blocks names a command and options that there are; links lead to pages."""
    text = page.read_text()
    for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
        for line in block.splitlines():
            program, *arguments = shlex.split(line, comments=True)
            if program == "fleetcast":
                done = CliRunner().invoke(app, [*arguments, "--help"])
                assert done.exit_code == 0, f"{line}: {done.output}"
    assert all((page.parent / link).exists() for link in re.findall(r"\]\(([\w.-]+\.md)\)", text))


def test_every_alert_has_a_unit_test() -> None:
    """In `alerts_test.yaml` each fires on some situation."""
    tests = yaml.safe_load((DOCKER / "prometheus/alerts_test.yaml").read_text())["tests"]
    fired = {each["alertname"] for test in tests for each in test["alert_rule_test"] if each["exp_alerts"]}
    assert fired == {rule["alert"] for rule in list_alerts()}


@needs_prometheus
@pytest.mark.parametrize("command", [["check", "rules", "alerts.yaml"], ["test", "rules", "alerts_test.yaml"]])
def test_promtool_accepts_the_rules(command: list[str]) -> None:
    """Their syntax, and what they do in made situations."""
    done = subprocess.run(
        ["promtool", *command], cwd=ALERTS.parent, capture_output=True, text=True, check=False, timeout=PATIENCE_S
    )
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"


# --- by a real Prometheus ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Watched:
    """A server at work, and the address of a Prometheus that scrapes it."""

    server: Server
    url: str
    at_start: set[str]  #: the series that the server had before its first request

    def ask(self, expr: str) -> list[dict[str, Any]]:
        """The samples that Prometheus has for a query now. Raises AssertionError for one that it refuses."""
        found = self.read("query", query=expr)
        rows: list[dict[str, Any]] = found["result"]
        return rows

    def await_data(self, queries: Iterable[Asked]) -> None:
        """Ask until each has had samples once: on a busy machine a scrape may fail, after which gauges have none."""
        silent = list(queries)

        def is_all_answered() -> bool:
            silent[:] = [asked for asked in silent if not self.ask(asked.expr)]
            return not silent

        try:
            wait_until(is_all_answered, "every query has samples")
        except AssertionError:
            raise AssertionError(f"no samples for {silent}") from None

    def read(self, what: str, **asked: str) -> Any:
        """An answer of Prometheus's API."""
        query = urllib.parse.urlencode(asked)
        with urllib.request.urlopen(f"{self.url}/api/v1/{what}?{query}", timeout=PATIENCE_S) as reply:
            answer = json.load(reply)
        assert answer["status"] == "success", answer
        return answer["data"]


def issue_certificate(folder: Path) -> tuple[Path, Path, Path]:
    """The certificate of 127.0.0.1, its key, and its authority."""
    ca = trustme.CA()
    made = ca.issue_cert("127.0.0.1")
    certificate, key, authority = (folder / name for name in ("server.pem", "server.key", "ca.pem"))
    certificate.write_bytes(b"".join(blob.bytes() for blob in made.cert_chain_pems))
    key.write_bytes(made.private_key_pem.bytes())
    authority.write_bytes(ca.cert_pem.bytes())
    return certificate, key, authority


def write_configuration(folder: Path, server: Server, authority: Path) -> Path:
    """The compose file's configuration, for this server: by TLS, every two seconds."""
    config = yaml.safe_load((DOCKER / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "2s", "evaluation_interval": "2s"}
    config["rule_files"] = [str(ALERTS)]
    (job,) = config["scrape_configs"]
    del job["authorization"]
    job |= {"scheme": "https", "tls_config": {"ca_file": str(authority)}}
    job["static_configs"] = [{"targets": [server.addresses["metrics"].removeprefix("https://")]}]
    path = folder / "prometheus.yml"
    path.write_text(yaml.safe_dump(config))
    return path


def read_series(server: Server) -> set[str]:
    """The series that a scrape has now, without their values."""
    lines = server.exposition().splitlines()
    return {line.rpartition(" ")[0] for line in lines if line.startswith(METRIC_PREFIX)}


def ask_fleet(server: Server, bodies: dict[str, bytes]) -> None:
    """Ask for all models in turn, of which the cache holds some."""
    for model, body in bodies.items():
        assert server.post(model, body, {"Content-Type": "application/json"}).status_code == 200


@pytest.fixture(scope="module")
def watched(s3: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """A server whose models do not all fit, asked for all of them again and again, and scraped meanwhile."""
    folder, bucket, port = tmp_path_factory.mktemp("watched"), s3.bucket(), find_free_port()
    models = pack_fleet("watched", 24)
    upload(s3, bucket, models)
    certificate, key, authority = issue_certificate(folder)
    client = httpx.Client(timeout=PATIENCE_S, trust_env=False, verify=ssl.create_default_context(cafile=authority))
    settings = {
        "slab_bytes": 65536, "model_cache_bytes": 65536, "host_cache_bytes": 65536, "revalidate_s": 1,
        "tls_certificate": certificate, "tls_key": key, "http": client,
    }  # fmt: skip
    with run_server(s3, folder, f"s3://{bucket}", **settings) as server:
        at_start, config = read_series(server), write_configuration(folder, server, authority)
        flags = [f"--config.file={config}", f"--storage.tsdb.path={folder / 'data'}"]
        flags += [f"--web.listen-address=127.0.0.1:{port}", EXEMPLARS]
        with start_service(["prometheus", *flags], {}, folder / "prometheus.log"):
            found = Watched(server, f"http://127.0.0.1:{port}", at_start)
            bodies = {model.name: model.question(0).body for model in models}
            total = f"sum({contract.INFERENCE_SECONDS.count})"

            def is_measured() -> bool:
                ask_fleet(server, bodies)
                try:
                    rows = found.ask(f"changes({total}[{WINDOW}:1s]) > 2")
                except OSError:  # it is starting
                    return False
                return bool(rows)

            wait_until(is_measured, "Prometheus has scraped the server at work several times")
            yield found


@needs_prometheus
@pytest.mark.e2e
def test_every_query_of_the_dashboard_has_data(watched: Watched) -> None:
    """Prometheus understands each, and has samples for it, or its panel is listed as empty in health."""
    queries = list_dashboard_queries()
    watched.await_data(asked for asked in queries if asked.owner not in EMPTY_IN_HEALTH)
    assert not [asked for asked in queries if asked.owner in EMPTY_IN_HEALTH and watched.ask(asked.expr)]


@needs_prometheus
@pytest.mark.e2e
def test_every_alert_measures_something(watched: Watched) -> None:
    """Without its comparisons each expression has samples: an alert on series that nobody exposes would never fire."""
    watched.await_data(Asked(rule["alert"], _COMPARISON.sub("", rule["expr"])) for rule in list_alerts())


@needs_prometheus
@pytest.mark.e2e
def test_prometheus_loads_the_rules_and_scrapes_without_complaint(watched: Watched) -> None:
    """All rules are evaluated without an error, and the target is up."""
    rules = [rule for group in watched.read("rules")["groups"] for rule in group["rules"]]
    assert {rule["name"] for rule in rules} == {rule["alert"] for rule in list_alerts()}
    wait_until(
        lambda: all(rule["health"] == "ok" for g in watched.read("rules")["groups"] for rule in g["rules"]),
        "every rule has been evaluated",
    )

    def is_up() -> bool:
        (target,) = watched.read("targets")["activeTargets"]
        return (target["health"], target["lastError"]) == ("up", "")

    wait_until(is_up, "a scrape has succeeded")


@needs_prometheus
@pytest.mark.e2e
def test_prometheus_keeps_request_ids_as_exemplars(watched: Watched) -> None:
    """A chart of request times leads to requests in the log; the compose file's Prometheus is told to keep them."""
    assert EXEMPLARS in yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]["prometheus"]["command"]
    found = watched.read(
        "query_exemplars", query=f"{contract.INFERENCE_SECONDS.series}_bucket", start="0", end=str(time.time())
    )
    ids = [exemplar["labels"]["request_id"] for series in found for exemplar in series["exemplars"]]
    assert ids
    assert all(ids)


@needs_prometheus
@pytest.mark.e2e
def test_no_series_appears_with_its_first_event(watched: Watched) -> None:
    """What a server at work shows, it has shown before the first request: an increase from nothing is an increase.

    But for the times of a protocol that nobody had asked before, of which its counters tell the first request.
    """
    appeared = read_series(watched.server) - watched.at_start
    assert {series for series in appeared if not series.startswith(contract.INFERENCE_SECONDS.series)} == set()
    later = {contract.MODEL_REQUESTS.series, contract.RELEASE_REQUESTS.series}  # of single models and names
    shown = {series.partition("{")[0] for series in watched.at_start}
    missing = {spec.series for spec in contract.METRICS if spec.kind != "histogram"} - shown - later
    assert {series for series in missing if not series.startswith(OF_ACTUALS)} == set()

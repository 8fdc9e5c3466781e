"""Writes Grafana's dashboard as JSON to standard output; `make docs` puts it into docker/grafana/dashboards.

A row is a question that an operator has, its panels are what answers it. Names of series come from `server.contract`
alone, so that a renamed metric is renamed here, and a removed one is an error.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from server import contract
from server.contract import MetricSpec

PANELS_A_ROW = 3
WIDTH, HEIGHT = 24 // PANELS_A_ROW, 8  #: of a panel, in Grafana's grid of 24 columns
SOURCE = {"type": "prometheus", "uid": "${source}"}
CHOSEN = 'instance=~"$instance"'  #: servers, by the dashboard's variable
WINDOW = "$__rate_interval"
REFUSED = 'code=~"429|503|507"'


@dataclass(frozen=True, slots=True)
class Query:
    """A query, and how its series are called."""

    expr: str
    legend: str
    exemplars: bool = False


@dataclass(frozen=True, slots=True)
class Panel:
    """A chart of some queries. `unit`: as Grafana calls it; `says`: what to see in it."""

    title: str
    unit: str
    queries: Sequence[Query]
    says: str
    most: float | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """A question, and the charts that answer it."""

    question: str
    panels: Sequence[Panel]


def _select(series: str, more: str = "") -> str:
    return f"{series}{{{','.join(filter(None, (CHOSEN, more)))}}}"


def _sum(spec: MetricSpec, by: str = "", more: str = "") -> str:
    return f"sum{f' by ({by})' if by else ''} ({_select(spec.series, more)})"


def _rate(spec: MetricSpec, by: str = "", more: str = "", series: str = "") -> str:
    return f"sum{f' by ({by})' if by else ''} (rate({_select(series or spec.series, more)}[{WINDOW}]))"


def _quantile(level: float, spec: MetricSpec, by: str = "") -> str:
    labels = ", ".join(filter(None, ("le", by)))
    return f"histogram_quantile({level}, {_rate(spec, labels, series=f'{spec.series}_bucket')})"


def _percentiles(spec: MetricSpec, levels: Sequence[float] = (0.5, 0.99, 0.999)) -> list[Query]:
    return [Query(_quantile(level, spec), f"p{level * 100:g}", exemplars=True) for level in levels]


def _share(spec: MetricSpec, more: str, of: str = "") -> str:
    return f"{_rate(spec, more=more)} / {_rate(spec, more=of)}"


CLIENTS = Row(
    "Do clients wait?",
    (
        Panel(
            "Answers by status",
            "reqps",
            (Query(_rate(contract.INFERENCE_REQUESTS, "code") + " > 0", "{{code}}"),),
            "200 is an answer. 429, 503 and 507 are refusals for want of room or time, 504 came too late.",
        ),
        Panel(
            "Time of a request",
            "s",
            _percentiles(contract.INFERENCE_SECONDS),
            "In the front, from receiving a request to sending its answer. Dots are requests by their id.",
        ),
        Panel(
            "Refused",
            "percentunit",
            (Query(_share(contract.INFERENCE_REQUESTS, REFUSED), "of all requests"),),
            "Above 1 % clients notice: see docs/runbooks/saturation.md.",
        ),
        Panel(
            "Wait for a step",
            "s",
            _percentiles(contract.QUEUE),
            "From a request's arrival to its step, without its load: it grows when a worker has too much to do.",
        ),
        Panel(
            "Requests under way and queued",
            "short",
            (
                Query(_sum(contract.UNDER_WAY, "worker"), "under way, worker {{worker}}"),
                Query(_sum(contract.WAITING_REQUESTS, "waiting_for"), "wait for a {{waiting_for}}"),
            ),
            "A queue that only grows ends in refusals.",
        ),
        Panel(
            "Wait for a load",
            "s",
            _percentiles(contract.LOADING_WAIT),
            "Of the requests whose model was not in memory.",
        ),
    ),
)
CACHE = Row(
    "Does the cache fit?",
    (
        Panel(
            "Hit ratio",
            "percentunit",
            (Query(_share(contract.CACHE_REQUESTS, 'result="hit"'), "in memory on arrival"),),
            "Below 80 % more memory pays: `fleetcast doctor --access-log` says how much.",
            most=1,
        ),
        Panel(
            "Room in use by tier",
            "percentunit",
            (Query(f"{_sum(contract.CACHE_BYTES, 'tier')} / {_sum(contract.CACHE_CAPACITY, 'tier')}", "{{tier}}"),),
            "A full tier is normal. It is too small if much of it is evicted and loaded again.",
            most=1,
        ),
        Panel(
            "Evictions",
            "ops",
            (Query(_rate(contract.EVICTIONS, "tier, reason"), "{{tier}}, {{reason}}"),),
            "`budget`: another model needed the room. `memory`: the device was out of memory.",
        ),
        Panel(
            "Age at eviction",
            "s",
            (
                Query(_quantile(0.1, contract.AGE_AT_EVICTION), "youngest tenth"),
                Query(_quantile(0.5, contract.AGE_AT_EVICTION), "half"),
            ),
            "Models evicted within a minute were loaded for little: see docs/runbooks/thrash.md.",
        ),
        Panel(
            "Resident models",
            "short",
            (Query(_sum(contract.LOADED_MODELS, "worker"), "worker {{worker}}"),),
            "How many models each worker holds.",
        ),
        Panel(
            "Requests by cache result",
            "reqps",
            (Query(_rate(contract.CACHE_REQUESTS, "result"), "{{result}}"),),
            "A miss starts a load, a coalesced request joins one.",
        ),
    ),
)
MARKETS = Row(
    "Is a market missing?",
    (
        Panel(
            "Models that do not serve",
            "short",
            (
                Query(_sum(contract.FAILED_MODELS), "last load failed"),
                Query(_sum(contract.QUARANTINED), "in quarantine"),
            ),
            "`fleetcast ls --failed` names them and says why.",
        ),
        Panel(
            "Failed loads",
            "ops",
            (Query(_rate(contract.LOAD_FAILURES, "reason") + " > 0", "{{reason}}"),),
            "Empty is good. `not_found`: clients ask for what the store does not have.",
        ),
        Panel(
            "Answers without a forecast",
            "reqps",
            (Query(_rate(contract.INFERENCE_REQUESTS, "code", 'code=~"404|424"'), "{{code}}"),),
            "404: no such archive. 424: the archive or its model failed.",
        ),
    ),
)
LOADS = Row(
    "Are loads fast?",
    (
        Panel(
            "Time of a load, p99 by tier",
            "s",
            (Query(_quantile(0.99, contract.LOADING, "tier"), "{{tier}}"),),
            "From the start of a load until its model serves: see docs/runbooks/slow-loads.md.",
        ),
        Panel(
            "Loads under way",
            "short",
            (Query(_sum(contract.LOADS_UNDER_WAY, "lane, state"), "{{lane}}, {{state}}"),),
            "Loads that wait in the lane `store` want more `loader_threads`, or a nearer store.",
        ),
        Panel(
            "Time of the store's answers",
            "s",
            _percentiles(contract.DOWNLOADING, (0.5, 0.99)),
            "Of a load's requests to the store.",
        ),
    ),
)
TICK = Row(
    "Are models there when the tick comes?",
    (
        Panel(
            "Prefetches",
            "ops",
            (Query(_rate(contract.PREFETCH, "result"), "{{result}}"),),
            "`used` were there in time. `late`: asked while they loaded: see docs/runbooks/late-tick.md.",
        ),
        Panel(
            "Models with a known rhythm",
            "short",
            (Query(_sum(contract.PREFETCH_MODELS, "worker"), "worker {{worker}}"),),
            "Those whose next request is predicted.",
        ),
        Panel(
            "Loads by tier",
            "ops",
            (Query(_rate(contract.LOADING, "tier", series=contract.LOADING.count), "{{tier}}"),),
            "A tick shows as a peak.",
        ),
    ),
)
STORE = Row(
    "Does the fleet follow the store?",
    (
        Panel(
            "The store has not answered for",
            "s",
            (Query(f"max ({_select(contract.STORE_FAILING.series)})", "longest"),),
            "Meanwhile what is in memory and on disk serves: see docs/runbooks/stale-store.md.",
        ),
        Panel(
            "Comparisons with the store",
            "ops",
            (Query(_rate(contract.STORE_CHECKS, "result"), "{{result}}"),),
            "`changed` archives are loaded and swapped in.",
        ),
        Panel(
            "Versions swapped, and stale models",
            "short",
            (
                Query(f"sum by (result) (increase({_select(contract.SWAPS.series)}[{WINDOW}]))", "swap {{result}}"),
                Query(_sum(contract.STALE_MODELS), "served from a kept copy"),
            ),
            "A failed swap leaves the old version serving.",
        ),
    ),
)
LIMITS = Row(
    "What limits the server?",
    (
        Panel(
            "Processor time by process",
            "percentunit",
            (Query(f"rate({_select(contract.PROCESS_CPU.series)}[{WINDOW}])", "{{process}}"),),
            "1 is a whole core. A front near 1: more `fronts`. Workers near their cores: more workers.",
        ),
        Panel(
            "Time in steps, by part",
            "percentunit",
            (Query(_rate(contract.STEP_SECONDS, "part"), "{{part}}"),),
            "Of one second, summed over workers.",
        ),
        Panel(
            "Rows and models of a step",
            "short",
            (
                Query(
                    f"{_rate(contract.BATCH_ROWS, series=contract.BATCH_ROWS.sum)}"
                    f" / {_rate(contract.BATCH_ROWS, series=contract.BATCH_ROWS.count)}",
                    "rows",
                ),
                Query(
                    f"{_rate(contract.BATCH_MODELS, series=contract.BATCH_MODELS.sum)}"
                    f" / {_rate(contract.BATCH_MODELS, series=contract.BATCH_MODELS.count)}",
                    "models",
                ),
            ),
            "Larger batches answer more with the same time.",
        ),
        Panel(
            "Memory by process",
            "bytes",
            (Query(_select(contract.PROCESS_MEMORY.series), "{{process}}"),),
            "Resident, with shared pages in each.",
        ),
        Panel(
            "Descriptors in use",
            "percentunit",
            (
                Query(
                    f"{_select(contract.PROCESS_OPEN_FILES.series)} / {_select(contract.PROCESS_MOST_FILES.series)}",
                    "{{process}}",
                ),
            ),
            "Of those that a process may open.",
            most=1,
        ),
        Panel(
            "Asynchronous invocations under way",
            "short",
            (Query(_sum(contract.ASYNC_UNDER_WAY), "wait or run"),),
            "They wait for models like other requests.",
        ),
    ),
)
HEALTH = Row("Is the server well?", (
    Panel("Workers that are up", "short", (Query(_sum(contract.WORKER_UP, "instance"), "{{instance}}"),),
          "A worker that is down has given its models to the others."),
    Panel("Restarts", "short", (
        Query(f"sum by (worker) (increase({_select(contract.WORKER_RESTARTS.series)}[{WINDOW}]))", "worker {{worker}}"),
    ), "See docs/runbooks/worker-restarts.md."),
    Panel("Up for", "s", (
        Query(f"time() - {_select(contract.PROCESS_START.series)}", "{{process}}"),
    ), "A process younger than the supervisor was restarted."),
    Panel("Versions", "short", (Query(_sum(contract.BUILD_INFO, "version, python"), "{{version}}, Python {{python}}"),),
          "How many servers run each version."),
    Panel("Certificates end in", "s", (
        Query(f"{_select(contract.CERTIFICATE_EXPIRY.series)} - time()", "{{instance}} {{setting}}"),
    ), "Empty without TLS."),
    Panel("Lines lost", "ops", (
        Query(_rate(contract.LOG_LINES_DROPPED), "log lines"),
        Query(_rate(contract.ACCESS_LOG_ROWS, more='result="dropped"'), "access log rows"),
    ), "Whoever reads them is too slow, or their disk is full."),
))  # fmt: skip
ROWS = (CLIENTS, CACHE, MARKETS, LOADS, TICK, STORE, LIMITS, HEALTH)


def make_dashboard() -> dict[str, Any]:
    """The dashboard as Grafana reads it."""
    return {
        "uid": "fleetcast",
        "title": "Fleetcast",
        "tags": ["fleetcast"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "graphTooltip": 1,
        "templating": {"list": [_make_source_variable(), _make_instance_variable()]},
        "panels": list(_lay_out(ROWS)),
    }


def _make_source_variable() -> dict[str, Any]:
    return {"name": "source", "label": "Prometheus", "type": "datasource", "query": "prometheus"}


def _make_instance_variable() -> dict[str, Any]:
    query = f"label_values({contract.BUILD_INFO.series}, instance)"
    return {
        "name": "instance",
        "label": "Servers",
        "type": "query",
        "datasource": SOURCE,
        "query": query,
        "definition": query,
        "includeAll": True,
        "multi": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
        "refresh": 2,
    }


def _lay_out(rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
    """Yield rows and their panels, three beside each other."""
    number = at = 0
    for row in rows:
        number += 1
        place = {"x": 0, "y": at, "w": 24, "h": 1}
        yield {"id": number, "type": "row", "title": row.question, "collapsed": False, "gridPos": place, "panels": []}
        at += 1
        for index, panel in enumerate(row.panels):
            number += 1
            below, beside = divmod(index, PANELS_A_ROW)
            place = {"x": beside * WIDTH, "y": at + below * HEIGHT, "w": WIDTH, "h": HEIGHT}
            yield {"id": number, **_draw(panel), "gridPos": place}
        at += -(-len(row.panels) // PANELS_A_ROW) * HEIGHT


def _draw(panel: Panel) -> dict[str, Any]:
    limits = {"min": 0} | ({} if panel.most is None else {"max": panel.most})
    targets = [
        {"refId": chr(ord("A") + at), "datasource": SOURCE, "expr": query.expr, "legendFormat": query.legend}
        | ({"exemplar": True} if query.exemplars else {})
        for at, query in enumerate(panel.queries)
    ]
    return {
        "type": "timeseries",
        "title": panel.title,
        "description": panel.says,
        "datasource": SOURCE,
        "targets": targets,
        "fieldConfig": {"defaults": {"unit": panel.unit, **limits}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
    }


if __name__ == "__main__":
    json.dump(make_dashboard(), sys.stdout, indent=1, ensure_ascii=False)
    sys.stdout.write("\n")

"""The part of the page `docs/comparison.md` that is made of the newest record of the comparison."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from loadtest.peers.comparison_table import CONNECTIONS, OURS, OURS_BINARY, OURS_NPY, format_spread
from loadtest.record import RECORDS

BEGIN = "<!-- What follows is made of the newest record of `make bench-peers`; `make docs` writes it. -->"
END = "<!-- The end of what is made of the record. -->"
ABSENT = "No record of this comparison is committed yet."


def read_newest_record(folder: Path = RECORDS) -> dict[str, Any]:
    """Read the newest record of the comparison; records begin with their date."""
    found: dict[str, Any] = json.loads(max(folder.glob("*-peers.json")).read_text())
    return found


def write_page(text: str, record: Mapping[str, Any]) -> str:
    """Return the page with its part between the two comments made of the record. Raises ValueError without them."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page has not both comments: {BEGIN} and {END}")
    part = "\n".join(_list_lines(record))
    return f"{before}{BEGIN}\n\n{part}\n\n{END}{after}"


def _list_lines(record: Mapping[str, Any]) -> Iterator[str]:
    results, machine = record["results"], record["machine"]
    if "goals" not in results:  # a record of before there were any, when these peers did not take part
        yield ABSENT
        return
    computer = f"{machine['cores']} cores ({machine['cpu']}, load average {machine['load_average_before']:.2f} before)"
    length = f"{results['rounds']} rounds of {results['seconds']:g} s a load"
    yield (
        f"Measured on {record['date'][:10]} at commit `{record['commit'][:7]}` on {computer}: {length}, medians, "
        "and in brackets the least and the most. Ratios are of the same round."
    )
    yield ""
    yield from _list_servers(results["servers"])
    for name, why in results["unavailable"].items():
        yield from ("", f"`{name}` was not measured: {why}")
    yield from ("", "| goal | reached | |", "|---|---|---|")
    for found in results["goals"]:
        yield f"| {found['goal']} | {format_spread(found['ratio'])} | {'' if found['holds'] else 'missed'} |"


def _list_servers(servers: Mapping[str, Any]) -> Iterator[str]:
    """A row for each server: what it reached, and what each of our ways reached by it."""
    ways = {OURS: "JSON", OURS_NPY: "npy", OURS_BINARY: "binary"}
    heads = ["server", *(f"requests/s at {connections}" for connections in CONNECTIONS), "p50 ms at 1"]
    heads += [f"our {way} / it at {connections}" for way in ways.values() for connections in (8, 32)]
    yield f"| {' | '.join(heads)} |"
    yield f"|{'---|' * len(heads)}"
    for name, found in servers.items():
        rows = {connections: found[f"{connections} connections"] for connections in CONNECTIONS}
        cells = [f"{name} ({found['version']})"]
        cells += [format_spread(rows[connections]["requests_per_s"]) for connections in CONNECTIONS]
        cells.append(format_spread(rows[1]["p50_ms"]))
        for ours in ways:
            ratios = [rows[connections].get(f"{ours} / it", {}) for connections in (8, 32)]
            cells += [f"{each['requests_per_s']['median']:.2f}" if each else "" for each in ratios]
        yield f"| {' | '.join(cells)} |"

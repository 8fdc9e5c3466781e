"""What a row of `GET /fleet/models` says of a model: its state, why it failed, what it has answered. Pure."""

from collections.abc import Mapping
from typing import Any

BAD_STATES = ("failed", "quarantined")

Row = Mapping[str, Any]  #: of one model, with its `holders`


def find_state(row: Row) -> str:
    """The state of a model by its row: quarantined, else ready where one holder is, else that of its holders."""
    states = [holder["state"] for holder in row["holders"]]
    if "state" in row:
        return str(row["state"])
    if "ready" in states:
        return "ready"
    return states[0] if states else "not loaded"


def find_reason(row: Row) -> str:
    """Why a model failed or is in quarantine; empty where it did not fail."""
    return str(row.get("reason") or next((each["error"] for each in row["holders"] if "error" in each), ""))


def sum_usage(row: Row, counted: str) -> int:
    """What the holders counted of a model, such as `answers`, since each loaded it."""
    return sum(holder["usage"][counted] for holder in row["holders"] if "usage" in holder)


def count_answers(before: Mapping[str, Row], now: Mapping[str, Row]) -> dict[str, int]:
    """The answers of each model between two lists. One that was loaded anew between them began at zero."""
    counts = {name: (sum_usage(before[name], "answers") if name in before else 0) for name in now}
    found = {name: sum_usage(row, "answers") for name, row in now.items()}
    return {name: count - (counts[name] if counts[name] <= count else 0) for name, count in found.items()}

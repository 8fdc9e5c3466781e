"""Results of wrk as if servers had been measured."""

from loadtest.driver import wrk
from loadtest.peers.comparison_table import CONNECTIONS


def make_runs(*rates: float) -> dict[int, list[wrk.WrkResult]]:
    """Make a run of each rate at each number of connections."""
    return {each: [wrk.WrkResult(rate, 1000 / rate, 5000 / rate, 0) for rate in rates] for each in CONNECTIONS}

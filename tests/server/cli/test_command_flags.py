"""The command that a page says it was made by is the one that made it."""

import shlex
from pathlib import Path

from server.cli.backtest import BacktestFlags
from server.cli.command_flags import write_command


def test_flags_are_written_as_they_were_given() -> None:
    """Arguments first, lists repeated, switches without a value, defaults left out, spaces quoted."""
    flags = BacktestFlags(csv=Path("my prices.csv"), time="hour", target=["A", "B"], since="2024-01-01", online=True)
    written = write_command("backtest", flags)
    assert written == (
        "fleetcast backtest 'my prices.csv' --time hour --target A --target B --from 2024-01-01 --online"
    )
    assert shlex.split(written)[2] == "my prices.csv"

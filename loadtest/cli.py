"""Measure a server under load: tail latency, hit ratio, load times and memory.

\b
A fleet and a server that it makes:     fleetcast-load run
Your archives, a server that it starts: fleetcast-load run --store s3://bucket/models --cache 256MiB --html report.html
A server that is running:               fleetcast-load run --url http://127.0.0.1:8080 --store s3://bucket/models
One with TLS and tokens:                fleetcast-load run --url https://127.0.0.1:8080 --ca ca.pem --token-file token
As other servers' clients ask:          fleetcast-load run --protocol torchserve --versions
"""  # noqa: D301 -- click's mark for "do not wrap"

from loadtest import cli_groups
from server.shell.commands import CommandSource, make_command_group

COMMANDS = {
    "run": CommandSource("loadtest.run_command", "run", "Load a fleet on a schedule that is drawn beforehand."),
    "report": CommandSource("loadtest.run_command", "report", "Write a report of one run, or of two side by side."),
    "fleet": CommandSource("loadtest.fleets.fleet", "main", "Make a fleet of archives for tests."),
    "plan": CommandSource("loadtest.plan.cli", "plan", "Simulate how many models fit, and what the fleet costs."),
    "calibrate": CommandSource("loadtest.plan.cli", "calibrate_server", "Measure the costs that `plan` uses."),
}

app = make_command_group(COMMANDS, __doc__, is_program=True)
app.add_typer(cli_groups.bench, name="bench", short_help="Benchmark the server beside something else.")
app.add_typer(cli_groups.demo, name="demo", short_help="Show what the server does.")


def main() -> None:
    """The command `fleetcast-load`."""
    app(prog_name="fleetcast-load")


if __name__ == "__main__":
    main()

"""The command line: `fleetcast serve | train | pack | inspect | verify | invoke | batch | backtest | retrain | ...`.

`serve` is the supervisor's process and stays without torch; the tools for archives import
`server.offline.archive_tools`, which has it, when they run.
"""

import asyncio
import contextlib
import json
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import rich
import typer
import uvloop
from rich.console import Console
from rich.table import Table

from model_store.errors import LoadError
from server.cli.backtest import backtest
from server.cli.batch import batch
from server.cli.correlate import correlate
from server.cli.doctor import doctor
from server.cli.retrain import retrain
from server.cli.setting_flags import settings_from, table, with_setting_flags, with_table
from server.cli.terminal import BAD, fail, one_line_errors
from server.cli.train import train
from server.logs import configure_logs
from server.offline.measures import Score
from server.sdk.client import ENDPOINT, sagemaker
from server.settings import Settings, format_bytes
from server.supervisor.management_api import running, until_told_to_stop
from server.supervisor.supervisor import StartFailed, Supervisor

DEEPAR_EXAMPLE = '{"instances": [{"start": "2026-01-01 00:00:00", "target": [41.5, 39.2, ...]}]}'
TENSOR_EXAMPLE = '{"x": [[0.1, 0.2, ...], ...]}'

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"max_content_width": 120},
)


def _file(text: str) -> Any:
    return typer.Option(exists=True, dir_okay=False, metavar="FILE", help=text)


Archives = Annotated[list[str], typer.Argument(metavar="ARCHIVE", help="paths or store URLs (s3://bucket/key)")]


def main() -> None:
    """The command `fleetcast`."""
    app(prog_name="fleetcast")


@app.callback(invoke_without_command=True)
def fleetcast(
    *, version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False
) -> None:
    """Serve a fleet of small forecast models: archives in an object store, one header, a cache of models.

    \b
    fleetcast serve --store s3://models/prices        run the server
    fleetcast invoke au/nsw1.mar --body r.json        ask it
    fleetcast train p.csv --time hour --target NSW1 --out models
    fleetcast pack au/nsw1.mar --onnx model.onnx      make an archive
    fleetcast inspect au/nsw1.mar                     look into one
    fleetcast verify au/*.mar                         prove that they would load
    fleetcast batch in.jsonl out.jsonl                answer a file of requests, without a server
    fleetcast backtest p.csv --time hour --models models    score archives on past prices
    fleetcast correlate p.csv --time hour --target NSW1 --target VIC1 --out joint.mar    for joint scenarios
    fleetcast retrain p.csv --time hour --store models      fit a fleet anew, publish what is no worse
    fleetcast doctor --store s3://models/prices       what this machine can do, and what is missing
    """  # noqa: D301 -- click's mark for "do not wrap"
    if version:
        print(f"fleetcast {_version()}")  # noqa: T201 -- the answer
        raise typer.Exit


# --- serve ----------------------------------------------------------------------------------------------------------


@app.command(short_help="Run the server.")
@with_setting_flags
def serve(**flags: Any) -> None:
    """Run the server until SIGTERM or Ctrl-C, then finish what is running and exit.

    \b
    fleetcast serve --store ./models
    fleetcast serve --store s3://models/prices --model-cache-bytes 2GiB --pin au/nsw1.mar
    FLEETCAST_STORE=gs://models/prices fleetcast serve --inference-port 9000

    Each flag is also a variable (--inference-port is FLEETCAST_INFERENCE_PORT) and a key of fleetcast.toml in the
    working folder (inference_port = 9000). Flags win over variables, variables over the file.
    """  # noqa: D301
    with one_line_errors(StartFailed):
        settings = settings_from(flags)
        configure_logs(settings.log_level, settings.log_format)
        uvloop.run(_serve(settings))


async def _serve(settings: Settings) -> None:
    """From start to drained; a signal during the start ends it as well."""
    told = asyncio.create_task(until_told_to_stop())
    async with contextlib.AsyncExitStack() as stack:
        start = asyncio.create_task(stack.enter_async_context(running(settings)))
        await asyncio.wait({start, told}, return_when=asyncio.FIRST_COMPLETED)
        if told.done():
            start.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await start
            return
        supervisor, addresses = await start
        console = Console(soft_wrap=True, highlight=False)
        for label, text in _welcome(supervisor, addresses):
            console.print(f"[bold]{label:<12}[/]", end="")
            console.print(text, markup=False)
        await told
        console.print("stopping: no new requests, running ones are finished")


def _welcome(supervisor: Supervisor, addresses: dict[str, str]) -> Iterator[tuple[str, str]]:
    """What runs where with which budget, a label and a text a line."""
    settings = supervisor.settings
    yield "fleetcast", f"{_version()} serves {settings.store}"
    yield "inference", f"{addresses['inference']}/invocations, the model in the header X-Amzn-SageMaker-Target-Model"
    yield "management", f"{addresses['management']}/fleet/models"
    yield "metrics", f"{addresses['metrics']}/metrics"
    for plan in supervisor.plans:
        threads = "1 thread" if plan.threads == 1 else f"{plan.threads} threads"
        cores = ",".join(map(str, plan.cores))
        room = format_bytes(plan.budget_bytes) if plan.budget_bytes else "its part of the GPU's memory"
        yield f"worker {plan.index}", f"{plan.device}, cores {cores}, {threads}, {room} for models"
    if settings.model_cache_bytes:
        origin = "as model_cache_bytes says"
    elif not supervisor.plans[0].budget_bytes:
        origin = "models lie in the GPUs' (gpu_reserve_bytes)"
    else:
        origin = "40 % of it is for models (model_cache_bytes)"
    yield "memory", f"{format_bytes(supervisor.host.memory_bytes)} on this host within its cgroup's limit; {origin}"
    if settings.disk_cache_bytes:
        yield "disk tier", f"{settings.disk_cache}, at most {format_bytes(settings.disk_cache_bytes)}"
    else:
        yield "disk tier", "off (disk_cache_bytes is 0)"
    yield "ready", "Ctrl-C or SIGTERM drains and stops"


# --- archives -------------------------------------------------------------------------------------------------------


app.command(short_help="Fit forecasters to your prices.")(train)
app.command(short_help="Answer a file of requests.")(batch)
app.command(short_help="Score archives on past prices.")(backtest)
app.command(short_help="Fit a fleet anew, publish what is no worse.")(retrain)
app.command(short_help="Learn how markets move together.")(correlate)
app.command(short_help="Look at this machine, measure what it can.")(doctor)


@app.command(short_help="Make an archive.")
def pack(
    out: Annotated[
        str, typer.Argument(metavar="OUT", help="path, its folder made if missing, or store URL (s3://bucket/key)")
    ],
    *,
    architecture: Annotated[str, typer.Option(help="of a forecaster, such as tcn or mlp")] = "",
    config: Annotated[
        str, typer.Option(metavar="JSON|FILE", help="what the architecture leaves open; a module's keyword arguments")
    ] = "{}",
    weights: Annotated[
        Path | None, _file("state dict: of a forecaster float32 safetensors, of a module .pt and .pth too")
    ] = None,
    module: Annotated[
        str,
        typer.Option(metavar="FILE.py:NAME", help="your own nn.Module: its class, or a function that makes it"),
    ] = "",
    inputs: Annotated[
        str, typer.Option(metavar="JSON", help='of a module: {"x": [8, 168]}, without the batch axis')
    ] = "",
    onnx: Annotated[Path | None, _file("an ONNX model in a single file")] = None,
    forecast: Annotated[Path | None, _file("JSON: what DeepAR requests become the network's input by")] = None,
    golden: Annotated[Path | None, _file("JSON: a request and the answer it must give")] = None,
    name: Annotated[str, typer.Option(help="model name in the manifest; default: the file's name")] = "",
    model_version: Annotated[str, typer.Option("--version", help="model version in the manifest")] = "1.0",
    description: Annotated[str, typer.Option(help="a line for people")] = "",
    gate: Annotated[Path | None, _file("CSV of prices: write only what is no worse there than what OUT has")] = None,
    gate_time: Annotated[str, typer.Option(metavar="COLUMN", help="its time stamps")] = "time",
    gate_target: Annotated[str, typer.Option(metavar="COLUMN", help="the price; default: the file's name")] = "",
    gate_score: Annotated[Score, typer.Option(help="what decides, lower is better")] = "pinball",
    gate_margin: Annotated[float, typer.Option(min=0, help="percent that it may be worse")] = 2.0,
    gate_windows: Annotated[int, typer.Option(min=1, help="last forecasts of the file to compare")] = 28,
) -> None:
    """Make an archive; it is proved as a worker would load it before it is written.

    \b
    A forecaster: an architecture that Fleetcast knows, and its state dict as safetensors
      fleetcast pack au/nsw1.mar --architecture tcn --config '{"channels": 32}' \\
          --weights w.safetensors --forecast forecast.json --golden golden.json
    Any other torch.nn.Module, as a graph of torch's operators (x [N, 8, 168] -> one tensor [N, ...])
      fleetcast pack au/nsw1.mar --module nets.py:Net --inputs '{"x": [8, 168]}' --weights w.safetensors
    An ONNX model
      fleetcast pack s3://models/prices/sa1.mar --onnx model.onnx

    --forecast is what DeepAR requests are checked against and turned into the network's input by: frequency, lengths,
    quantile levels, channels, scaler. --golden is a request and its answer, checked whenever the archive is loaded.
    Equal input gives equal bytes. --module imports and runs your file, here and now; the archive holds none of it, and
    a server never runs code from a graph. Models of one graph run together where that gives the same answers.
    --gate lets OUT's new and old archive forecast the same windows, ends with 1 where the new one is worse by more than
    the margin, and else notes in its description how they compared.
    """  # noqa: D301
    from server.offline import archive_tools as workshop  # noqa: PLC0415 -- torch
    from server.offline.promotion_gate import Gate, Refused, judged  # noqa: PLC0415
    from server.offline.rolling_windows import Rolling  # noqa: PLC0415

    if sum(map(bool, (architecture, module, onnx))) != 1 or (onnx and (weights or forecast)):
        fail(
            "give --architecture and --weights for a forecaster, --module and --inputs for a module of your own, "
            "or --onnx alone for an ONNX model"
        )
    if bool(module) != bool(inputs):
        fail("--module and --inputs belong together: what your forward takes, such as --inputs '{\"x\": [8, 168]}'")
    with one_line_errors(StartFailed):
        store, key = workshop.split(out)
        if module:
            spec = workshop.graph_spec(forecast, description)
            members = workshop.graph_members(module, config, inputs, weights)
        elif onnx is not None:
            spec = workshop.onnx_spec(description)
            members = {spec.weights.file: onnx.read_bytes()}
        elif weights is not None:
            spec = workshop.forecaster_spec(architecture, config, forecast, description)
            members = {spec.weights.file: weights.read_bytes()}
        else:
            fail(f"--architecture {architecture} needs its numbers: give a state dict with --weights")
        plain = Path(key).name.partition(".")[0]
        labels = {"model_name": name or plain, "model_version": model_version}
        packed = workshop.pack(spec, members, golden, **labels)
        if "://" not in out:
            Path(store).mkdir(parents=True, exist_ok=True)
        place = workshop.place(settings_from({"store": store}), key)
        proof = workshop.proved_bytes(packed, key, place.limits)
        if gate is not None:
            terms = Gate(gate_score, gate_margin, Rolling(most=gate_windows))
            try:
                verdict = judged(terms, gate, gate_time, gate_target or plain, place, packed)
            except Refused as refused:
                fail(f"{refused}; nothing is written", BAD)
            packed = workshop.pack(spec, members, golden, **labels, note=str(verdict))
            proof = f"{proof}; {verdict}"
        place.source.put(key, packed)
    print(f"{out}: {len(packed)} bytes; {proof}")  # noqa: T201


@app.command(short_help="Show what an archive is.")
def inspect(
    archive: Annotated[str, typer.Argument(metavar="ARCHIVE", help="path or store URL (s3://bucket/key)")],
    *,
    as_json: Annotated[bool, typer.Option("--json", help="for programs")] = False,
) -> None:
    """Show what an archive is: kind, configuration, members, tensors, hash; of a graph, how its models run.

    \b
    fleetcast inspect au/nsw1.mar
    fleetcast inspect s3://models/prices/au/nsw1.mar --json | jq .spec.forecast
    """  # noqa: D301
    from server.offline import archive_tools as workshop  # noqa: PLC0415 -- torch

    with one_line_errors(StartFailed):
        store, key = workshop.split(archive)
        opened, data = workshop.place(settings_from({"store": store}), key).archive()
        found = workshop.described(opened, data)
    if as_json:
        print(json.dumps(found, indent=1))  # noqa: T201
        return
    rows = Table("", "", show_header=False, box=None, pad_edge=False)
    for label, text in workshop.lines(found):
        rows.add_row(f"[bold]{label}[/]", text)
    rich.print(rows)


@app.command(short_help="Prove that archives would load.")
def verify(archives: Archives) -> None:
    """Do everything a load does, the golden sample included; a line each, exit code 1 when any is bad.

    \b
    fleetcast verify models/au/*.mar
    fleetcast verify s3://models/prices/au/nsw1.mar
    """  # noqa: D301
    from server.offline import archive_tools as workshop  # noqa: PLC0415 -- torch

    bad = 0
    for archive in archives:
        try:
            store, key = workshop.split(archive)
            proof = workshop.proved(workshop.place(settings_from({"store": store}), key))
            print(f"ok   {archive}: {proof}")  # noqa: T201
        except (LoadError, ValueError, OSError) as error:
            bad += 1
            print(f"BAD  {archive}: {error}")  # noqa: T201
    if bad:
        raise typer.Exit(BAD)


# --- a client -------------------------------------------------------------------------------------------------------


@app.command(short_help="Ask a running server.")
def invoke(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="the archive's key under the store, such as au/nsw1.mar")
    ],
    *,
    body: Annotated[str, typer.Option(metavar="FILE|-", help="the request; - reads standard input")] = "",
    url: Annotated[str, typer.Option(help="inference address of the server")] = "http://127.0.0.1:8080",
    content_type: Annotated[str, typer.Option(help="of the request")] = "application/json",
    accept: Annotated[str, typer.Option(help="wanted of the answer; default: like the request")] = "",
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="also what the cache did, on stderr")] = False,
) -> None:
    """Ask a running server as SageMaker's own client does: boto3's sagemaker-runtime.

    \b
    fleetcast invoke au/nsw1.mar --body request.json -v
    echo '{"instances": [{"start": "2026-01-01 00:00:00", "target": [41.5, 39.2]}]}' | \\
        fleetcast invoke au/nsw1.mar --body -
    """  # noqa: D301
    if not body:
        fail(
            f"what shall be asked? Send a file with --body FILE (or - for standard input): {DEEPAR_EXAMPLE} for a "
            f"forecast, {TENSOR_EXAMPLE} for a model that is asked for tensors"
        )
    with one_line_errors(StartFailed):
        asked = sys.stdin.buffer.read() if body == "-" else Path(body).read_bytes()
    answer, headers = _invoke(url, model, asked, content_type, {"Accept": accept} if accept else {})
    if verbose:
        for key in sorted(headers):
            if key.startswith("x-fleetcast-") or key == "server-timing":
                print(f"{key}: {headers[key]}", file=sys.stderr)  # noqa: T201
    if sys.stdout.isatty() and "json" in headers.get("content-type", ""):
        rich.print_json(answer.decode())
    else:
        sys.stdout.buffer.write(answer)


def _invoke(
    url: str, model: str, body: bytes, content_type: str, accept: dict[str, str]
) -> tuple[bytes, dict[str, str]]:
    """The answer and its headers; an error ends the command with its type and message."""
    from botocore.exceptions import BotoCoreError, ClientError  # noqa: PLC0415 -- boto3 takes a third of a second

    try:
        reply = sagemaker(url).invoke_endpoint(
            EndpointName=ENDPOINT, TargetModel=model, Body=body, ContentType=content_type, **accept
        )
    except ClientError as error:
        fail(f"{error.response['Error']['Code']}: {error.response['Error']['Message']}", BAD)
    except (BotoCoreError, ValueError) as error:
        fail(f"{error} (is `fleetcast serve` running at {url}?)")
    return reply["Body"].read(), reply["ResponseMetadata"]["HTTPHeaders"]


# --- documentation --------------------------------------------------------------------------------------------------


@app.command(hidden=True)
def settings_table(
    document: Annotated[Path | None, typer.Argument(help="write the table between its marks in this file")] = None,
) -> None:
    """Every setting as a Markdown table, printed or written into a document."""
    if document is None:
        print(table())  # noqa: T201
        return
    with one_line_errors(StartFailed):
        document.write_text(with_table(document.read_text()))


# --- parts ----------------------------------------------------------------------------------------------------------


def _version() -> str:
    """Of the installed distribution, or of the checkout we are run in."""
    try:
        return version("fleetcast")
    except PackageNotFoundError:
        project = tomllib.loads(Path(__file__).parents[2].joinpath("pyproject.toml").read_text())
        return str(project["project"]["version"])


if __name__ == "__main__":
    main()

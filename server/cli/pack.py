"""`fleetcast pack` makes an archive, and writes it only if it loads and passes its gate. It imports torch late."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from server.cli import price_flags
from server.cli.command_flags import with_flags
from server.cli.setting_flags import settings_from
from server.cli.terminal import BAD, fail, one_line_errors
from server.shell.escaping import escape_text

if TYPE_CHECKING:
    from server.offline.archive_location import ArchiveLocation

    Comparison = Callable[[ArchiveLocation, bytes], str]


def _read_file(text: str) -> Any:
    return typer.Option(exists=True, dir_okay=False, metavar="FILE", help=text)


@dataclass(frozen=True, slots=True, kw_only=True)
class PackFlags:
    """The arguments of `fleetcast pack`."""

    out: Annotated[
        str,
        typer.Argument(metavar="OUT", help="path, whose folder is created if missing, or store URL (s3://bucket/key)"),
    ]
    architecture: Annotated[str, typer.Option(help="architecture of a forecaster, such as tcn or mlp")] = ""
    config: Annotated[
        str,
        typer.Option(metavar="JSON|FILE", help="config fields of the architecture, or a module's keyword arguments"),
    ] = "{}"
    weights: Annotated[Path | None, _read_file("state dict: float32 safetensors, for a module also .pt or .pth")] = None
    module: Annotated[
        str,
        typer.Option(metavar="FILE.py:NAME", help="your own nn.Module: its class, or a function that returns one"),
    ] = ""
    inputs: Annotated[
        str, typer.Option(metavar="JSON", help='input shapes of the module without the batch axis: {"x": [8, 168]}')
    ] = ""
    onnx: Annotated[Path | None, _read_file("an ONNX model in a single file")] = None
    forecast: Annotated[Path | None, _read_file("JSON: how a DeepAR request becomes the network's input")] = None
    golden: Annotated[Path | None, _read_file("JSON: the golden sample, a request and its expected answer")] = None
    name: Annotated[str, typer.Option(help="model name in the manifest; default: the name of the file")] = ""
    model_version: Annotated[str, typer.Option("--version", help="model version in the manifest")] = "1.0"
    description: Annotated[str, typer.Option(help="description in the manifest, one line of text")] = ""
    gate: Annotated[
        Path | None, _read_file("price file (CSV): replace OUT only if the new archive scores no worse on it")
    ] = None
    gate_time: Annotated[
        str, typer.Option("--gate-time", "--time", metavar="COLUMN", help="column of the time stamps in that file")
    ] = "time"
    gate_target: Annotated[
        str, typer.Option(metavar="COLUMN", help="column of the prices in that file; default: the name of OUT's file")
    ] = ""
    gate_score: price_flags.GateScore = "pinball"
    gate_margin: price_flags.GateMargin = price_flags.GATE_MARGIN
    gate_windows: Annotated[int, typer.Option(min=1, help="number of last windows that the gate compares")] = (
        price_flags.GATE_WINDOWS
    )
    interval_ending: price_flags.IntervalEnding = False
    stamps_zone: price_flags.StampsZone = ""
    time_format: price_flags.TimeFormat = ""
    item: price_flags.Item = ""


@with_flags(PackFlags)
def pack(flags: PackFlags) -> None:
    """Make an archive. It is verified as a worker would load it before it is written.

    \b
    A forecaster: one of Fleetcast's architectures, and its state dict as safetensors
      fleetcast pack au/nsw1.mar --architecture tcn --config '{"channels": 32}' \\
          --weights w.safetensors --forecast forecast.json --golden golden.json
    Any other torch.nn.Module, as a graph of torch's operators (x [N, 8, 168] -> one tensor [N, ...])
      fleetcast pack au/nsw1.mar --module nets.py:Net --inputs '{"x": [8, 168]}' --weights w.safetensors
    An ONNX model
      fleetcast pack s3://models/prices/sa1.mar --onnx model.onnx

    --forecast describes a DeepAR request and how it becomes the network's input: frequency, lengths, quantile levels,
    channels, scaler. --golden is a request and its answer, which every load checks. Equal input gives equal bytes.
    --module imports and runs your file in this command; the archive contains no code of it, and a server never runs
    code from a graph. Models of one graph run together if that gives the same answers. --gate lets the new archive and
    the one at OUT forecast the same windows; if the new one is worse by more than the margin, nothing is written and
    the exit code is 1, else the description records the comparison. Its file is read on the clock of the archive, by
    the flags that backtest has: --time, --interval-ending, --stamps-zone, --time-format, --item.
    """  # noqa: D301
    from server.offline.archive_location import split_location  # noqa: PLC0415 -- torch, here and below
    from server.offline.packing import pack as pack_archive  # noqa: PLC0415
    from server.offline.promotion_gate import GateRefused  # noqa: PLC0415

    with one_line_errors():
        compare = _make_comparison(flags)
        store, _ = split_location(flags.out)
        try:
            packed = pack_archive(
                flags.out,
                architecture=flags.architecture,
                config=flags.config,
                weights=flags.weights,
                module=flags.module,
                inputs=flags.inputs,
                onnx=flags.onnx,
                forecast=flags.forecast,
                golden=flags.golden,
                name=flags.name,
                model_version=flags.model_version,
                description=flags.description,
                settings=settings_from({"store": store}),
                compare=compare,
            )
        except GateRefused as refused:
            fail(f"{refused}; nothing is written", BAD)
    print(escape_text(f"{flags.out}: {packed.bytes} bytes; {packed.proof}"))  # noqa: T201


def _make_comparison(flags: PackFlags) -> "Comparison | None":
    """The comparison of the gate with what OUT has; None without a gate. Raises ValueError."""
    from server.offline.promotion_gate import GateTerms, compare_with_predecessor  # noqa: PLC0415 -- torch
    from server.offline.rolling_windows import Rolling  # noqa: PLC0415

    rules = price_flags.make_file_rules(flags.interval_ending, flags.stamps_zone, flags.time_format, flags.item)
    gate = flags.gate
    if gate is None:
        if flags.interval_ending or flags.stamps_zone or flags.time_format or flags.item:
            raise ValueError("--interval-ending, --stamps-zone, --time-format and --item read the file of --gate")
        return None
    terms = GateTerms(flags.gate_score, flags.gate_margin, Rolling(most=flags.gate_windows))

    def compare(location: "ArchiveLocation", packed: bytes) -> str:
        target = flags.gate_target or location.name.rpartition("/")[2].partition(".")[0]
        verdict = compare_with_predecessor(terms, gate, flags.gate_time, target, location, packed, rules)
        price_flags.print_notes(gate, verdict.notes)
        return str(verdict)

    return compare

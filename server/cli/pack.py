"""`fleetcast pack`: makes an archive, and writes it only where it loads and passes its gate. Torch when it runs."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from server.cli.setting_flags import settings_from
from server.cli.terminal import BAD, fail, one_line_errors
from server.logs import escape_text
from server.offline.measures import Score

if TYPE_CHECKING:
    from server.offline.archive_location import ArchiveLocation


def _read_file(text: str) -> Any:
    return typer.Option(exists=True, dir_okay=False, metavar="FILE", help=text)


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
        Path | None, _read_file("state dict: of a forecaster float32 safetensors, of a module .pt and .pth too")
    ] = None,
    module: Annotated[
        str,
        typer.Option(metavar="FILE.py:NAME", help="your own nn.Module: its class, or a function that makes it"),
    ] = "",
    inputs: Annotated[
        str, typer.Option(metavar="JSON", help='of a module: {"x": [8, 168]}, without the batch axis')
    ] = "",
    onnx: Annotated[Path | None, _read_file("an ONNX model in a single file")] = None,
    forecast: Annotated[Path | None, _read_file("JSON: what DeepAR requests become the network's input by")] = None,
    golden: Annotated[Path | None, _read_file("JSON: a request and the answer it must give")] = None,
    name: Annotated[str, typer.Option(help="model name in the manifest; default: the file's name")] = "",
    model_version: Annotated[str, typer.Option("--version", help="model version in the manifest")] = "1.0",
    description: Annotated[str, typer.Option(help="a line for people")] = "",
    gate: Annotated[
        Path | None, _read_file("CSV of prices: write only what is no worse there than what OUT has")
    ] = None,
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
    from server.offline.archive_location import split_location  # noqa: PLC0415 -- torch
    from server.offline.packing import pack as pack_archive  # noqa: PLC0415
    from server.offline.promotion_gate import GateRefused, GateTerms, compare_with_predecessor  # noqa: PLC0415
    from server.offline.rolling_windows import Rolling  # noqa: PLC0415

    def compare(location: "ArchiveLocation", packed: bytes) -> str:
        assert gate is not None, "asked only where there is a gate"
        terms = GateTerms(gate_score, gate_margin, Rolling(most=gate_windows))
        target = gate_target or location.name.rpartition("/")[2].partition(".")[0]
        return str(compare_with_predecessor(terms, gate, gate_time, target, location, packed))

    with one_line_errors():
        store, _ = split_location(out)
        try:
            packed = pack_archive(
                out,
                architecture=architecture,
                config=config,
                weights=weights,
                module=module,
                inputs=inputs,
                onnx=onnx,
                forecast=forecast,
                golden=golden,
                name=name,
                model_version=model_version,
                description=description,
                settings=settings_from({"store": store}),
                compare=None if gate is None else compare,
            )
        except GateRefused as refused:
            fail(f"{refused}; nothing is written", BAD)
    print(escape_text(f"{out}: {packed.bytes} bytes; {packed.proof}"))  # noqa: T201

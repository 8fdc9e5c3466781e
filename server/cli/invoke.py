"""`fleetcast invoke`: asks a running server."""

import sys
from pathlib import Path
from typing import Annotated

import rich
import typer

from server.cli.terminal import BAD, fail, one_line_errors
from server.sdk.client import ENDPOINT, sagemaker

DEEPAR_EXAMPLE = '{"instances": [{"start": "2026-01-01 00:00:00", "target": [41.5, 39.2, ...]}]}'
TENSOR_EXAMPLE = '{"x": [[0.1, 0.2, ...], ...]}'


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
    with one_line_errors():
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

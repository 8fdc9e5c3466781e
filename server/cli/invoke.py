"""`fleetcast invoke` sends a request to a running server."""

import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import rich
import typer

from server.cli.terminal import BAD, fail, one_line_errors
from server.contract import GRPC_PORT, HEADER_SERVER_TIMING, INFERENCE_PORT, JSON
from server.sdk.protocols import Protocol, wrap_forecast
from server.shell.escaping import escape_text

if TYPE_CHECKING:
    from server.sdk.client import Reply

DEFAULT_URL, DEFAULT_GRPC_URL = f"http://127.0.0.1:{INFERENCE_PORT}", f"http://127.0.0.1:{GRPC_PORT}"
DEEPAR_EXAMPLE = '{"instances": [{"start": "2026-01-01 00:00:00", "target": [41.5, 39.2, ...]}]}'
TENSOR_EXAMPLE = '{"x": [[0.1, 0.2, ...], ...]}'


class InvokeProtocol(StrEnum):
    """What `--protocol` takes."""

    SAGEMAKER = Protocol.SAGEMAKER
    TORCHSERVE = Protocol.TORCHSERVE
    V2 = Protocol.V2
    FORECASTS = Protocol.FORECASTS
    GRPC = "grpc"


def invoke(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="the archive's key under the store, such as au/nsw1.mar")
    ],
    *,
    body: Annotated[str, typer.Option(metavar="FILE|-", help="file of the request body; - reads standard input")] = "",
    url: Annotated[
        str,
        typer.Option(
            help=f"inference address of the server; default {DEFAULT_URL}, of protocol grpc {DEFAULT_GRPC_URL}"
        ),
    ] = "",
    content_type: Annotated[str, typer.Option(help="content type of the request")] = "application/json",
    accept: Annotated[str, typer.Option(help="content type of the answer; default: that of the request")] = "",
    protocol: Annotated[
        InvokeProtocol, typer.Option(help="protocol in which the model is asked; grpc: v2 by gRPC")
    ] = InvokeProtocol.SAGEMAKER,
    version: Annotated[
        str, typer.Option(metavar="VERSION", help="version of the model, for the protocols torchserve, v2 and grpc")
    ] = "",
    example: Annotated[
        bool,
        typer.Option(
            "--example",
            help="send nothing: print a body that this model answers, with invented numbers; the server is asked by "
            f"HTTP, at --url or {DEFAULT_URL}",
        ),
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="print the cache result and timings on stderr")
    ] = False,
) -> None:
    """Send a request to a model of a running server and print the answer.

    The request carries the token of the variable FLEETCAST_TOKEN. Without a token it is signed if boto3's credential
    chain finds an access key. For https, SSL_CERT_FILE names certificate authorities to trust beside the system's.

    \b
    fleetcast invoke au/nsw1.mar --body request.json -v
    echo '{"instances": [{"start": "2026-01-01 00:00:00", "target": [41.5, 39.2]}]}' | \\
        fleetcast invoke au/nsw1.mar --body -
    fleetcast invoke au/nsw1.mar --example > request.json
    fleetcast invoke old/text.mar --body sample.txt --content-type text/plain --protocol torchserve
    fleetcast invoke au/nsw1.mar --body request.json --protocol v2
    fleetcast invoke au/nsw1.mar --body request.json --protocol forecasts
    fleetcast invoke au/nsw1.mar --body request.json --protocol grpc
    """  # noqa: D301
    if example:
        _print_example(model, url or DEFAULT_URL)
        return
    if not body:
        fail(
            f"there is no request: give its file with --body FILE (or - for standard input): {DEEPAR_EXAMPLE} for a "
            f"forecast, {TENSOR_EXAMPLE} for a model of tensors; --example prints one that this model answers"
        )
    with one_line_errors():
        request = sys.stdin.buffer.read() if body == "-" else Path(body).read_bytes()
        reply = _invoke(url, model, request, (content_type, accept), protocol, version)
    _print_reply(reply, verbose=verbose)


def _invoke(
    url: str, model: str, body: bytes, media: tuple[str, str], protocol: InvokeProtocol, version: str
) -> "Reply":
    """The server's answer. A refusal, or a server that cannot be reached, ends the command."""
    from server.sdk.errors import FleetcastError, Unreachable  # noqa: PLC0415

    try:
        if protocol is InvokeProtocol.GRPC:
            return _invoke_by_grpc(url or DEFAULT_GRPC_URL, model, body, version)
        return _invoke_by_http(url or DEFAULT_URL, model, body, media, Protocol(protocol), version)
    except Unreachable as error:
        fail(str(error))
    except FleetcastError as error:
        fail(f"{error.error_type or f'status {error.status}'}: {error}", BAD)


def _print_reply(reply: "Reply", *, verbose: bool) -> None:
    """The answer on standard output, and with `verbose` what the server says of it on standard error."""
    if verbose:
        for key in sorted(reply.headers):
            if key.startswith("x-fleetcast-") or key == HEADER_SERVER_TIMING.lower():
                print(escape_text(f"{key}: {reply.headers[key]}"), file=sys.stderr)  # noqa: T201
    if sys.stdout.isatty() and "json" in reply.content_type:
        rich.print_json(reply.body.decode(), ensure_ascii=True)
    else:
        sys.stdout.buffer.write(reply.body)


def _print_example(model: str, url: str) -> None:
    """Ask the server what the model wants, and print a body of that form."""
    from server.sdk.client import Client  # noqa: PLC0415
    from server.sdk.errors import FleetcastError  # noqa: PLC0415
    from server.sdk.signing import find_access_key, find_token  # noqa: PLC0415 -- botocore

    with one_line_errors():
        try:
            found = Client(url, access_key=find_access_key(), token=find_token()).example(model)
        except FleetcastError as error:
            fail(str(error), BAD)
        except ValueError as error:  # NoExample
            fail(f"there is no example of {model}: {error}")
    print(json.dumps(found))  # noqa: T201


def _invoke_by_http(
    url: str, model: str, body: bytes, media: tuple[str, str], protocol: Protocol, version: str
) -> "Reply":
    """`media`: the types of the request and of the answer. Raises FleetcastError, ValueError."""
    from server.sdk.client import Client  # noqa: PLC0415
    from server.sdk.signing import find_access_key, find_token  # noqa: PLC0415 -- botocore

    client = Client(url, access_key=find_access_key(), token=find_token())
    content_type, accept = media
    body = wrap_forecast(body) if protocol is Protocol.V2 else body
    return client.invoke(model, body, content_type=content_type, accept=accept, protocol=protocol, version=version)


def _invoke_by_grpc(url: str, model: str, body: bytes, version: str) -> "Reply":
    """Raises FleetcastError, ValueError, ModuleNotFoundError that says what to install."""
    from server.sdk.client import Reply  # noqa: PLC0415
    from server.sdk.signing import find_token  # noqa: PLC0415 -- botocore

    try:
        from server.cli.grpc_request import send_by_grpc  # noqa: PLC0415 -- grpcio, an extra
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{error}; the protocol grpc needs it: pip install 'fleetcast[grpc]'") from error
    answer, headers = send_by_grpc(url, model, body, version, find_token())
    return Reply(answer, JSON, headers)

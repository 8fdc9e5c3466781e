"""A running server as its clients and operators see it. For commands, never for servers."""

import json
import os
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from typing import Any
from urllib.parse import quote, urlsplit

from model_store.names import ModelName

ENDPOINT = "fleetcast"  #: any name that SageMaker's rule allows is served
OK, NOT_FOUND = 200, 404
RELOAD_S = 60.0


class Unreachable(ValueError):
    """The server did not do what it was told; the message names it and says why."""


def sagemaker(url: str) -> Any:
    """boto3's `sagemaker-runtime` for the inference listener at `url`; without keys of the caller's own, with dummies.

    Thread-safe. Raises ValueError for a URL that is none.
    """
    import boto3  # noqa: PLC0415 -- a third of a second that only who asks has to pay

    os.environ.setdefault("AWS_EC2_METADATA_DISABLED", "true")  # no server's keys are an EC2 role's: do not ask for one
    session = boto3.Session()
    keys = {} if session.get_credentials() else {"aws_access_key_id": "none", "aws_secret_access_key": "none"}
    region = session.region_name or "us-east-1"
    return session.client("sagemaker-runtime", endpoint_url=url, region_name=region, **keys)


def reload(url: str, model: ModelName) -> None:
    """Tell the management listener at `url` that the archive has changed; a model that it does not hold is left alone.

    Returns when the new version serves. Raises Unreachable.
    """
    parts = urlsplit(url)
    connect = {"http": HTTPConnection, "https": HTTPSConnection}.get(parts.scheme)
    if connect is None or not parts.netloc:
        raise Unreachable(f"{url!r} is no management address; give one such as http://127.0.0.1:8081")
    connection = connect(parts.netloc, timeout=RELOAD_S)
    try:
        if _ask(connection, "GET", f"{parts.path.rstrip('/')}/fleet/models/{quote(model)}")[0] == NOT_FOUND:
            return
        status, said = _ask(connection, "POST", f"{parts.path.rstrip('/')}/fleet/reload/{quote(model)}")
    except (OSError, HTTPException) as error:
        raise Unreachable(
            f"{url}: {error!r} (is `fleetcast serve` running there, with this management port?)"
        ) from error
    finally:
        connection.close()
    if status != OK:
        raise Unreachable(f"{url} did not take {model}: {said}")


def _ask(connection: HTTPConnection, method: str, path: str) -> tuple[int, str]:
    connection.request(method, path)
    reply = connection.getresponse()
    body = reply.read()
    try:
        return reply.status, str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return reply.status, body.decode(errors="replace")[:200]

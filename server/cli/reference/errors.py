"""The page of errors: what each situation means and what to do, and how each protocol says it.

Statuses are not written here: each dialect is asked for its refusal of each situation.
"""

import json
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from model_store import errors
from model_store.errors import LoadError
from server.errors import Refused, Situation, situation_of
from server.front.dialects import DIALECTS
from server.front.dialects.multi_model_server import MultiModelServer
from server.front.exchange import HttpReply, HttpRequest
from server.front.grpc.statuses import STATUS as GRPC_STATUS
from server.routes.inference import PROTOCOLS
from server.settings import Settings
from server.worker.quarantine import ModelQuarantined


class Advice(NamedTuple):
    """What a reader wants to know of an error."""

    cause: str
    remedy: str


ADVICE: Mapping[Situation, Advice] = {
    Situation.BAD_NAME: Advice(
        "The model's name is no name: empty, too long, or with `..` or a leading slash.",
        "Send the archive's key below the store, such as `au/nsw1.mar`.",
    ),
    Situation.NO_TARGET: Advice(
        "The request names no model.",
        "Send the header `X-Amzn-SageMaker-Target-Model`, or name the model where your protocol has it. "
        "For clients that cannot, set `default_model`.",
    ),
    Situation.BAD_REQUEST: Advice(
        "The body is wrong. The message begins with the place, such as `instances[3].start:`.",
        "Compare with `fleetcast invoke MODEL --example`, which prints a body that the model answers. Do not repeat it "
        "unchanged.",
    ),
    Situation.TOO_LARGE: Advice(
        "The body is larger than a limit, which the message names.",
        "Send fewer instances a call, or raise that setting (`max_body_bytes`, `max_forecasts_bytes`).",
    ),
    Situation.NOT_FOUND: Advice(
        "The store has no archive of this name.",
        "Look at `fleetcast ls` and at the store. A new archive is found within a second.",
    ),
    Situation.MODEL_FAILED: Advice(
        "The model could not answer this request: a number that is not finite, an error of its runtime or of its code.",
        "Try the archive alone: `fleetcast verify`. If only some requests fail, the message says what of them.",
    ),
    Situation.ARCHIVE_FAILED: Advice(
        "The archive cannot be loaded, or the model is in quarantine. The table of loads below has each reason.",
        "`fleetcast verify` says the same without a server. Put a good archive into the store: it is taken at once.",
    ),
    Situation.STORE_FAILED: Advice(
        "The store refuses the credentials or does not answer, and no copy of the archive is on disk.",
        "Clients try again as `Retry-After` says. Operators: [the store does not answer](../runbooks/stale-store.md).",
    ),
    Situation.NO_ROOM: Advice(
        "The model needs more memory than there is, or pinned models fill it.",
        "Raise `model_cache_bytes`, or unpin models.",
    ),
    Situation.OVERLOADED: Advice(
        "More requests wait than a queue takes, or the answer would come after the deadline.",
        "Try again as `Retry-After` says. If it lasts: [more to do than it can](../runbooks/saturation.md).",
    ),
    Situation.NOT_READY: Advice(
        "The server is starting or stopping, or no worker is up.",
        "Try again in a second, or ask another server. `GET /ready` says when.",
    ),
    Situation.WORKER_LOST: Advice(
        "The worker that had the request died, and so did the second try.",
        "Try again. Operators: [a worker was restarted](../runbooks/worker-restarts.md).",
    ),
    Situation.DEADLINE: Advice(
        "The answer was not ready at the deadline.",
        "Give more time (`X-Request-Timeout-Ms`, at most `request_timeout_s`), or load the model before it is asked: "
        "`fleetcast pin`.",
    ),
    Situation.INTERNAL: Advice(
        "The server failed: an error of Fleetcast itself.",
        "Find the log's line with the same `X-Request-Id`, and report it.",
    ),
    Situation.NO_ROUTE: Advice("There is no such path.", "[Routes](routes.md) has all of them."),
    Situation.BAD_METHOD: Advice(
        "The path exists, but not with this method.", "The message says which method it takes."
    ),
    Situation.SLOW_CLIENT: Advice(
        "The client took longer than `client_timeout_s` to send its request.",
        "Look at the network between; a client behind a slow line needs a longer `client_timeout_s`.",
    ),
    Situation.BAD_SIGNATURE: Advice(
        "The signature (SigV4) does not fit: another key, secret or region, or a clock that is off.",
        "Compare the key with `access_keys_file`, the region with `access_region`, and the client's clock.",
    ),
    Situation.UNSUPPORTED_CODING: Advice(
        "The body's `Content-Encoding` is not gzip, deflate or zstd.",
        "Send the body in one of these, or as it is.",
    ),
    Situation.UNAUTHORIZED: Advice(
        "The server asks for a token or a signature, and the request has none that it knows.",
        "Send `Authorization: Bearer TOKEN`: [Security](../security.md#tokens).",
    ),
    Situation.FORBIDDEN: Advice(
        "The token is not for this listener or this model, or a browser's page asks for what only programs may.",
        "Make one with the scope or prefix that is needed: `fleetcast token`.",
    ),
}
LOAD_ADVICE: Mapping[str, str] = {
    "not_found": "Look for the key in the store; names are whole keys, with their ending.",
    "store_denied": "Let the server's credentials read the key, and list the prefix.",
    "store_unavailable": "See [the store does not answer](../runbooks/stale-store.md).",
    "archive_invalid": "`fleetcast verify` names the rule that it breaks. Pack it anew.",
    "archive_too_large": "Make it smaller, or raise the limit that the message names.",
    "unsupported_kind": "Pack it as a kind that this server runs: [Your models](../your-models.md).",
    "code_failed": "The message has the exception, with its file and line: [Archives with code](../code-archives.md).",
    "code_no_memory": "Raise `code_memory_bytes`.",
    "code_busy": "Ask again in a moment: other archives with code are being loaded.",
    "golden_mismatch": "The model answers otherwise than when it was packed: compare weights and precision.",
    "no_room": "Raise `model_cache_bytes`, or unpin models.",
    "quarantined": "See [models are in quarantine](../runbooks/quarantine.md).",
}
_INTRODUCTION = """An error says what was wrong, where, and what to do, in the words of the client's protocol. This
page lists every kind of error. Look for the kind first (`/v1/forecasts` sends it as `code`);
its number in your protocol is in the second table."""
_STATUSES = """The HTTP status of each kind, and the code of gRPC. With `overload_status` 429 `overloaded` is
429. Where two numbers stand, the second is the `OriginalStatusCode` of SageMaker's
`ModelError`: its clients would repeat a bare 504."""
_LOADS = """Why a model could not be loaded: the label `reason` of `fleetcast_model_load_failures_total`,
and in the list of `GET /fleet/models`. A failure is remembered for a short while, so that a bad
archive is not fetched again for every request."""


def render_errors() -> str:
    """The kinds with cause and remedy, their statuses by protocol, and the reasons of failed loads."""
    kinds = ["| kind | what happened | what to do |", "|---|---|---|"]
    kinds += [f"| `{_name(kind)}` | {each.cause} | {each.remedy} |" for kind, each in ADVICE.items()]
    parts = [_INTRODUCTION, "\n".join(kinds), "## By protocol", _STATUSES, _tabulate_statuses()]
    parts += ["## When a model does not load", _LOADS, _tabulate_loads()]
    return "\n\n".join(parts)


def _tabulate_statuses() -> str:
    settings = Settings.model_construct(store="s3://bucket")  # the defaults, whatever file and variables say here
    dialects = [make(settings) for make in (*DIALECTS, MultiModelServer)]
    shown = [dialect for dialect in dialects if dialect.name in PROTOCOLS and dialect.name != "health"]
    request = HttpRequest("POST", "/", {}, client_gone=_never_gone)
    rows = ["| kind | " + " | ".join(PROTOCOLS[each.name].title for each in shown) + " | gRPC |"]
    rows.append("|---" * (len(shown) + 2) + "|")
    for kind in ADVICE:
        why = Refused(kind, "why")
        cells = [_say_status(each.refused(why, request)) for each in shown]
        rows.append(f"| `{_name(kind)}` | {' | '.join(cells)} | {GRPC_STATUS[kind].name} |")
    return "\n".join(rows)


def _say_status(reply: HttpReply) -> str:
    """For example `424 (504)`: the status, and that which SageMaker's clients see as the model's own."""
    said = json.loads(reply.body) if reply.body.startswith(b"{") else {}
    original = said.get("OriginalStatusCode") if isinstance(said, dict) else None
    return f"{reply.status} ({original})" if original else str(reply.status)


def _tabulate_loads() -> str:
    rows = ["| reason | kind | what happened | what to do |", "|---|---|---|---|"]
    for error in _list_load_errors():
        happened = (error.__doc__ or "").partition("\n")[0]
        kind = Situation.ARCHIVE_FAILED if error is ModelQuarantined else situation_of(error(""))
        rows.append(f"| `{error.reason}` | `{_name(kind)}` | {happened} | {LOAD_ADVICE[error.reason]} |")
    return "\n".join(rows)


def _list_load_errors() -> Iterator[type[LoadError]]:
    """One class for each reason."""
    kinds = [each for each in vars(errors).values() if isinstance(each, type)]
    seen = {LoadError.reason}  # which no load ends with: each situation has a class of its own
    for kind in (*kinds, ModelQuarantined):
        if issubclass(kind, LoadError) and kind.reason not in seen:
            seen.add(kind.reason)
            yield kind


def _name(kind: Situation) -> str:
    return kind.name.lower()


async def _never_gone() -> object:
    """The client of a request that is not sent."""
    return None

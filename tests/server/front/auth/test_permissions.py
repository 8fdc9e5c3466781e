"""Tokens at the inference listener: every dialect and every item needs them, and messages never show them."""

import asyncio
import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from server.access.tokens import hash_token
from server.errors import Situation
from server.front.app import App
from server.front.auth.permissions import open_permissions
from server.front.dialects import DIALECTS
from server.metrics import FrontMetrics
from server.settings import Settings
from tests.server.front.answering import Answered, Worker, ask, attach
from tests.server.front.test_app import Toy

AU, DE = "au/nsw1.mar", "de/lu.mar"
SIGNED = "AWS4-HMAC-SHA256 Credential=AKIA/20260101/us-east-1/sagemaker/aws4_request, SignedHeaders=host, Signature=0"


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    """A token for `au/`, and one of another scope."""
    rows = (("desk", "invoke"), ("ops", "manage"))
    path = tmp_path / "tokens.toml"
    path.write_text(
        "".join(
            f'[[tokens]]\nname = "{name}"\nsha256 = "{hash_token(f"{name}-secret".encode())}"\n'
            f'scopes = ["{scope}"]\nmodels = ["au/"]\n'
            for name, scope in rows
        )
    )
    return path


def make_app(worker: Worker, **settings: object) -> App:
    """The app with the toy dialect, which knows nothing of tokens."""
    made = App(Settings.model_validate({"store": "models", **settings}), FrontMetrics(), (Toy, *DIALECTS))
    attach(made.plane, worker)
    return made


def post(made: App, path: str, headers: Mapping[str, str], body: bytes = b"{}") -> Answered:
    """One request."""
    return asyncio.run(ask(made, "POST", path, body, headers))


def invoke(made: App, model: str, authorization: str | None = None) -> Answered:
    """One by the SageMaker dialect."""
    sent = {} if authorization is None else {"Authorization": authorization}
    return post(made, "/invocations", {"X-Amzn-SageMaker-Target-Model": model, **sent})


def test_tokens_in_the_sagemaker_dialect(tokens: Path) -> None:
    """401 in boto3's form with WWW-Authenticate, 403 for another scope or model; nothing of it reaches a worker."""
    worker = Worker(lambda _: b"1")
    made = make_app(worker, tokens=tokens)
    assert invoke(made, AU, "Bearer desk-secret").status == 200
    assert len(worker.asked) == 1
    for shown in (None, "Bearer desk-secre", "Basic ZGVzazo=", SIGNED):
        refused = invoke(made, AU, shown)
        assert (refused.status, refused.headers["www-authenticate"]) == (401, "Bearer")
        assert refused.headers["x-amzn-errortype"] == "UnrecognizedClientException"
        assert b"desk-secre" not in refused.body
    assert "bearer tokens, not signatures" in invoke(made, AU, SIGNED).body.decode()
    for model, shown in ((DE, "Bearer desk-secret"), (AU, "Bearer ops-secret")):
        refused = invoke(made, model, shown)
        assert (refused.status, refused.headers["x-amzn-errortype"]) == (403, "AccessDeniedException")
    assert len(worker.asked) == 1


def test_a_dialect_cannot_forget_the_check(tokens: Path) -> None:
    """One that knows nothing of tokens is asked for allowed models alone."""
    worker = Worker(lambda asked: asked.body)
    made, sent = make_app(worker, tokens=tokens), {"Authorization": "Bearer desk-secret"}
    assert post(made, f"/toy/{AU}", sent, b"x").body == b"<x>"
    assert post(made, f"/toy/{DE}", sent).status == 500 + Situation.FORBIDDEN
    assert post(made, f"/toy/{AU}", {}).status == 500 + Situation.UNAUTHORIZED
    assert [asked.model for asked in worker.asked] == [AU]


def test_each_item_needs_the_token(tokens: Path) -> None:
    """Of a call for many models; one refused item leaves the others, and probes and unknown paths ask for none."""
    worker = Worker(lambda _: b'{"predictions":[{"mean":[1.0]}]}')
    made = make_app(worker, tokens=tokens)
    body = json.dumps({"requests": [{"target_model": DE}, {"target_model": AU}]}).encode()
    found = json.loads(post(made, "/v1/forecasts", {"Authorization": "Bearer desk-secret"}, body).body)
    assert (found["failed"], found["predictions"][0]["error"]["code"]) == (1, "forbidden")
    assert found["predictions"][1] == {"mean": [1.0]}
    assert [asked.model for asked in worker.asked] == [AU]
    refused = post(made, "/v1/forecasts", {}, body)
    assert (refused.status, json.loads(refused.body)["error"]["code"]) == (401, "unauthorized")
    assert made.plane.held.size == 0
    assert [post(made, path, {}).status for path in ("/ping", "/ready", "/nowhere")] == [200, 200, 404]


def test_keys_and_tokens(tokens: Path) -> None:
    """Where both are configured a signature is judged as one, anything else as a token; nothing where neither is."""
    worker = Worker(lambda _: b"1")
    both = make_app(worker, tokens=tokens, access_keys={"AKIA": "hidden"})
    assert invoke(both, AU, "Bearer desk-secret").status == 200
    assert invoke(both, AU, SIGNED).status == 403
    assert "or sign the request with an access key" in invoke(both, AU).body.decode()
    keys = make_app(worker, access_keys={"AKIA": "hidden"})
    assert [invoke(keys, AU, shown).status for shown in (None, "Bearer desk-secret", SIGNED)] == [403] * 3
    assert "hidden" not in repr(
        open_permissions(Settings.model_validate({"store": "x", "access_keys": {"A": "hidden"}}))
    )
    assert open_permissions(Settings.model_validate({"store": "models"})) is None
    assert invoke(make_app(worker), AU).status == 200


def test_a_body_is_not_read_for_strangers(tokens: Path) -> None:
    """They are refused by the head: a body above the limit is not what they are told about."""
    made = make_app(Worker(lambda _: b"1"), tokens=tokens, max_body_bytes=10)
    assert post(made, "/invocations", {"X-Amzn-SageMaker-Target-Model": AU}, bytes(1000)).status == 401


def test_a_worker_knows_whose_a_request_is(tokens: Path) -> None:
    """By its token's name, in each dialect, for each item: clients take turns. In an open server all are one's."""
    worker = Worker(lambda _: b'{"predictions":[{"mean":[1.0]}]}')
    made, sent = make_app(worker, tokens=tokens), {"Authorization": "Bearer desk-secret"}
    invoke(made, AU, sent["Authorization"])
    post(made, "/v1/forecasts", sent, json.dumps({"requests": [{"target_model": AU}]}).encode())
    assert [asked.client for asked in worker.asked] == ["desk", "desk"]
    invoke(make_app(worker), AU)
    assert worker.asked[-1].client == ""

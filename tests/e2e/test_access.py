"""Access over HTTP at real listeners: pages of other sites, tokens and scopes, TLS, the audit log."""

import contextlib
import hashlib
import json
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import boto3
import botocore
import httpx
import pytest
import trustme
from botocore.config import Config
from botocore.exceptions import ClientError

from fleetcast import Client
from server.sdk.errors import AccessDenied
from tests.e2e.conftest import Serve
from tests.e2e.models import FORECAST_TCN, Model, pack_forecaster
from tests.e2e.server import Server, invoke, run_server, upload
from tests.patience import PATIENCE_S, wait_until
from tests.s3 import S3Server

pytestmark = pytest.mark.e2e

SCOPES: Mapping[str, tuple[list[str], list[str]]] = {
    "desk": (["invoke"], ["au/"]),
    "ops": (["manage"], []),
    "au-ops": (["manage"], ["au/"]),
    "prometheus": (["metrics"], []),
    "all": (["invoke", "manage", "metrics"], []),
}


def write_tokens(folder: Path) -> Path:
    """A file in which each token is its name with `-secret`."""
    rows = [
        f'[[tokens]]\nname = "{name}"\nsha256 = "{hashlib.sha256(f"{name}-secret".encode()).hexdigest()}"\n'
        f"scopes = {json.dumps(scopes)}\nmodels = {json.dumps(models)}\n"
        for name, (scopes, models) in SCOPES.items()
    ]
    path = folder / "tokens.toml"
    path.write_text("\n".join(rows))
    return path


def make_bearer(name: str) -> dict[str, str]:
    """The header of a token."""
    return {"Authorization": f"Bearer {name}-secret"}


def audit(server: Server) -> list[tuple[Any, ...]]:
    """The audit log so far: token, verb, model, status."""
    lines = [json.loads(line) for line in server.said().splitlines() if '"management_call"' in line]
    assert all((line["peer"], line["certificate"]) == ("127.0.0.1", "-") for line in lines)
    return [(line["token"], line["verb"], line["model"], line["status"]) for line in lines]


def upload_model(s3: S3Server, bucket: str) -> Model:
    """One model in the store, `au/...`."""
    made = pack_forecaster("au/00.mar", 1, config=FORECAST_TCN, forecast=True)
    upload(s3, bucket, [made])
    return made


@pytest.fixture
def model(s3: S3Server, store: str) -> Model:
    """The model in the test's own bucket."""
    return upload_model(s3, store)


@pytest.fixture(scope="module")
def guarded(s3: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Model]]:
    """A server that tokens alone open, and its model."""
    bucket, folder = s3.bucket(), tmp_path_factory.mktemp("guarded")
    model = upload_model(s3, bucket)
    with run_server(s3, folder, f"s3://{bucket}", tokens=write_tokens(folder)) as server:
        yield server, model


def test_pages_of_other_sites_do_nothing(model: Model, serve: Serve) -> None:
    """DNS rebinding (another name in Host) and forged POSTs (Origin, Sec-Fetch-Site) are refused at management and
    metrics, and are in the audit log; the operator's own calls, and the console's own page, are served.
    """
    rebound = {"Host": "evil.example:8081"}
    forged = [{"Origin": "http://evil.example"}, {"Origin": "null"}, {"Sec-Fetch-Site": "cross-site"}]
    with serve() as server:
        management, metrics = server.addresses["management"], server.addresses["metrics"]
        load = f"{management}/fleet/load/{model.name}"
        for headers in [rebound, *forged]:
            for method, url in (
                ("POST", load),
                ("GET", f"{management}/fleet/models"),
                ("GET", f"{management}/fleet/processes"),
                ("GET", f"{metrics}/metrics"),
            ):
                reply = server.http.request(method, url, headers=headers)
                assert (reply.status_code, reply.json()["error"]["code"]) == (403, "forbidden"), (headers, url)
        assert server.resident() == set()
        own = {"Origin": management, "Sec-Fetch-Site": "same-origin"}
        assert server.http.post(load, headers=own).status_code == 200
        assert server.http.get(f"{management}/ping", headers=rebound).status_code == 200
        refused, done = ("-", "load", model.name, 403), ("-", "load", model.name, 200)
        wait_until(lambda: len(audit(server)) == 5, "the log, which is written beside the answers, has all five")
        assert audit(server) == [refused] * 4 + [done]


def test_tokens_open_what_their_scopes_say(guarded: tuple[Server, Model]) -> None:
    """All three listeners: no token and unknown ones are 401 with WWW-Authenticate, other scopes and models 403; probes
    are open; the audit log names the tokens and nothing of their values.
    """
    server, model = guarded
    management, metrics = server.addresses["management"], server.addresses["metrics"]
    load, models = f"{management}/fleet/load/{model.name}", f"{management}/fleet/models"
    question = model.question(0)
    body, target = question.body, {"X-Amzn-SageMaker-Target-Model": model.name}

    def ask_statuses(method: str, url: str, **more: Any) -> dict[str, int]:
        headers = more.pop("headers", {})
        return {
            name: server.http.request(method, url, headers={**headers, **make_bearer(name)}, **more).status_code
            for name in SCOPES
        }

    only = dict.fromkeys(SCOPES, 403)
    assert ask_statuses("POST", f"{server.url}/invocations", content=body, headers=target) == {
        **only, "desk": 200, "all": 200,
    }  # fmt: skip
    assert ask_statuses("POST", load) == {**only, "ops": 200, "au-ops": 200, "all": 200}
    assert ask_statuses("GET", models) == {**only, "ops": 200, "all": 200}
    assert ask_statuses("GET", f"{models}?prefix=au/") == {**only, "ops": 200, "au-ops": 200, "all": 200}
    assert ask_statuses("GET", f"{models}?prefix=au/&prefix=") == {**only, "ops": 200, "all": 200}
    assert ask_statuses("GET", f"{management}/fleet/processes") == {**only, "ops": 200, "all": 200}
    assert ask_statuses("GET", f"{metrics}/metrics") == {**only, "prometheus": 200, "all": 200}
    assert ask_statuses("POST", f"{management}/fleet/unload/de/lu.mar")["au-ops"] == 403
    for method, url in (("POST", f"{server.url}/invocations"), ("POST", load), ("GET", f"{metrics}/metrics")):
        for headers in ({}, {"Authorization": "Bearer no-such-token"}, {"Authorization": "Basic YTpi"}):
            reply = server.http.request(method, url, headers=headers)
            assert (reply.status_code, reply.headers["www-authenticate"]) == (401, "Bearer")
    assert all(server.http.get(f"{url}/ping").status_code == 200 for url in (server.url, management))
    for page in ("/", "/console/console.js"):  # they hold no data; what they ask for needs the token
        assert server.http.get(f"{management}{page}").status_code == 200
        assert server.http.post(f"{management}{page}").status_code == 401
    assert server.http.get(f"{management}/", headers={"Host": "evil.example"}).status_code == 403
    assert ask_statuses("GET", f"{management}/fleet/overview") == {**only, "ops": 200, "all": 200}
    trial = f"{management}/fleet/try/{model.name}"
    assert ask_statuses("POST", trial, content=body) == {**only, "ops": 200, "au-ops": 200, "all": 200}
    assert server.http.get(f"{management}/fleet/sample/{model.name}").status_code == 401
    refused = {("au-ops", "unload", "de/lu.mar", 403), ("-", "load", model.name, 401)}
    wait_until(lambda: refused <= {*audit(server)}, "the audit log has both")
    assert "-secret" not in server.said()
    assert "no-such-token" not in server.said()


def test_every_item_and_the_correlation_need_the_token(guarded: tuple[Server, Model]) -> None:
    """In a call for many models an item of another prefix is refused alone; as the correlation it fails the call."""
    server, model = guarded
    instance = json.loads(model.question(0).body)["instances"][0]
    items = [{"target_model": name, **instance} for name in (model.name, "de/lu.mar")]

    def call(requests: list[Any], configuration: Mapping[str, Any]) -> httpx.Response:
        body = {"requests": requests, "configuration": configuration}
        return server.http.post(f"{server.url}/v1/forecasts", json=body, headers=make_bearer("desk"))

    good, bad = call(items, {}).json()["predictions"]
    assert "error" not in good
    assert bad["error"]["code"] == "forbidden"
    joint = call(items[:1], {"joint": True, "correlation": "de/joint.mar"})
    assert (joint.status_code, joint.json()["error"]["code"]) == (403, "forbidden")
    assert "de/joint.mar" in joint.json()["error"]["message"]


def sent_with(server: Server, token: str, **more: Any) -> Any:
    """Boto3 as docs/security.md shows it for servers with tokens."""
    client = boto3.client(
        "sagemaker-runtime",
        endpoint_url=server.url,
        region_name="us-east-1",
        config=Config(signature_version=botocore.UNSIGNED, retries={"total_max_attempts": 1}),
        **more,
    )

    def add_token(params: dict[str, Any], **_: Any) -> None:
        params["headers"]["Authorization"] = f"Bearer {token}"

    client.meta.events.register("before-call.sagemaker-runtime", add_token)
    return client


def test_boto3_and_the_client_send_tokens(guarded: tuple[Server, Model]) -> None:
    """A signature where only tokens are says what to do."""
    server, model = guarded
    question = model.question(0)
    question.check(invoke(sent_with(server, "desk-secret"), model.name, question.body).body)
    with pytest.raises(ClientError, match="bearer tokens, not signatures") as refused:
        server.ask(question)
    assert refused.value.response["Error"]["Code"] == "UnrecognizedClientException"
    with pytest.raises(ClientError, match="AccessDenied"):
        invoke(sent_with(server, "prometheus-secret"), model.name, question.body)
    with Client(server.url, token="desk-secret") as client:
        question.check(client.invoke(model.name, question.body).body)
    with Client(server.url) as client, pytest.raises(AccessDenied, match="wants a token"):
        client.invoke(model.name, question.body)


def test_access_keys_beside_tokens(model: Model, serve: Serve, tmp_path: Path) -> None:
    """Either suffices; no process shows the keys in its command line or environment."""
    question = model.question(0)
    tokens = write_tokens(tmp_path)
    keys = tmp_path / "keys.toml"
    keys.write_text('AKIAFLEET = "hidden/secret"\n')
    keys.chmod(0o600)
    with serve(tokens=tokens, access_keys_file=keys) as server:
        question.check(invoke(sent_with(server, "desk-secret"), model.name, question.body).body)
        server.ask(question, server.client(key="AKIAFLEET", secret="hidden/secret"))
        with pytest.raises(ClientError, match="AccessDenied"):
            server.ask(question, server.client(key="AKIAFLEET", secret="wrong"))
        assert server.post(model.name).status_code == 401
        seen = [_read(pid, name) for pid in server.survivors() for name in ("cmdline", "environ")]
        assert not any(b"hidden/secret" in each for each in seen)
        fronts = [_read(row["pid"], "environ") for row in _list_processes(server, "front")]
        assert len(fronts) == 1
        assert b"AWS_SECRET_ACCESS_KEY" not in fronts[0]


def _list_processes(server: Server, kind: str) -> list[Any]:
    reply = server.http.get(f"{server.addresses['management']}/fleet/processes", headers=make_bearer("ops"))
    return [row for row in reply.json()["processes"] if row["kind"] == kind]


def _read(pid: int, name: str) -> bytes:
    return Path(f"/proc/{pid}/{name}").read_bytes()


# --- TLS ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def ca() -> trustme.CA:
    """An authority."""
    return trustme.CA()


def issue(ca: trustme.CA, folder: Path) -> dict[str, Path]:
    """A certificate of 127.0.0.1, written over the one that is there, and the authority; as settings."""
    made = ca.issue_cert("127.0.0.1")
    paths = {name: folder / f"{name}.pem" for name in ("tls_certificate", "tls_key", "tls_client_ca")}
    paths["tls_certificate"].write_bytes(b"".join(blob.bytes() for blob in made.cert_chain_pems))
    paths["tls_key"].write_bytes(made.private_key_pem.bytes())
    paths["tls_client_ca"].write_bytes(ca.cert_pem.bytes())
    return paths


def fetch_certificate(server: Server, listener: str, context: ssl.SSLContext) -> bytes:
    """The certificate that a new connection to a listener is shown."""
    host, _, port = server.addresses[listener].removeprefix("https://").rpartition(":")
    with contextlib.closing(_connect(host, int(port), context)) as sock:
        return sock.getpeercert(binary_form=True) or b""


def is_renewed(server: Server, listener: str, context: ssl.SSLContext, before: bytes) -> bool:
    """Whether a new connection is shown another certificate than `before`."""
    return fetch_certificate(server, listener, context) != before


def _connect(host: str, port: int, context: ssl.SSLContext) -> ssl.SSLSocket:
    raw = socket.create_connection((host, port), PATIENCE_S)
    return context.wrap_socket(raw, server_hostname=host)


def test_mutual_tls_on_every_listener(model: Model, serve: Serve, tmp_path: Path, ca: trustme.CA) -> None:
    """Httpx, boto3 and the SDK's client with certificates of the authority are served; without one nothing is; a
    renewed certificate is shown by every listener while the server runs.
    """
    paths = issue(ca, tmp_path)
    mine = ca.issue_cert("desk@example.org").private_key_and_cert_chain_pem
    mine.write_to_path(str(tmp_path / "desk.pem"))
    known, nobody = (ssl.create_default_context(cafile=paths["tls_client_ca"]) for _ in range(2))
    known.load_cert_chain(tmp_path / "desk.pem")
    http = httpx.Client(verify=known, timeout=PATIENCE_S, trust_env=False)
    question = model.question(0)
    with serve(http=http, **paths) as server:
        assert {url.partition(":")[0] for url in server.addresses.values()} == {"https"}
        management, metrics = server.addresses["management"], server.addresses["metrics"]
        assert server.fleet("load", model.name).status_code == 200
        assert "fleetcast_worker_up" in server.exposition()
        pem, own = str(paths["tls_client_ca"]), str(tmp_path / "desk.pem")
        config = Config(signature_version=botocore.UNSIGNED, client_cert=own, retries={"total_max_attempts": 1})
        client = boto3.client(
            "sagemaker-runtime", endpoint_url=server.url, region_name="us-east-1", verify=pem, config=config
        )
        question.check(invoke(client, model.name, question.body).body)
        with Client(server.url, ssl_context=known) as sdk:
            question.check(sdk.invoke(model.name, question.body).body)
        with httpx.Client(verify=nobody, trust_env=False) as stranger:
            for url in (f"{server.url}/ping", f"{management}/ping", f"{metrics}/metrics"):
                with pytest.raises(httpx.TransportError):
                    stranger.get(url)
        first = {listener: fetch_certificate(server, listener, known) for listener in server.addresses}
        issue(ca, tmp_path)
        for listener, before in first.items():
            renewed = partial(is_renewed, server, listener, known, before)
            wait_until(renewed, f"{listener} shows the renewed certificate")
        assert server.http.get(f"{management}/fleet/models").status_code == 200


def is_let_in(server: Server, listener: str, context: ssl.SSLContext) -> bool:
    """Whether a new connection to a listener is answered: with TLS 1.3 a refusal comes after the client's handshake."""
    host, _, port = server.addresses[listener].removeprefix("https://").rpartition(":")
    try:
        with contextlib.closing(_connect(host, int(port), context)) as sock:
            sock.sendall(f"GET /ping HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
            return sock.recv(5) == b"HTTP/"
    except (ssl.SSLError, ConnectionError):
        return False


def show_certificate(trusted: Path, signed_by: trustme.CA, identity: str, **more: str) -> ssl.SSLContext:
    """A client that trusts the server's authority and shows a certificate of another one."""
    context = ssl.create_default_context(cafile=trusted)
    signed_by.issue_cert(identity, **more).configure_cert(context)  # type: ignore[arg-type]
    return context


def test_a_withdrawn_authority_opens_no_new_connection(
    model: Model, serve: Serve, tmp_path: Path, ca: trustme.CA
) -> None:
    """Its clients are refused by every listener while the server runs; a connection that was open goes on.

    Clients of the authority that stays are served.
    """
    paths, other = issue(ca, tmp_path), trustme.CA()
    both = ca.cert_pem.bytes() + other.cert_pem.bytes()
    paths["tls_client_ca"].write_bytes(both)
    own = tmp_path / "server-ca.pem"
    ca.cert_pem.write_to_path(str(own))
    stays, goes = show_certificate(own, ca, "stays@example.org"), show_certificate(own, other, "goes@example.org")
    with (
        serve(http=httpx.Client(verify=stays, timeout=PATIENCE_S, trust_env=False), **paths) as server,
        httpx.Client(verify=goes, timeout=PATIENCE_S, trust_env=False) as opened,
    ):
        url = f"{server.addresses['management']}/fleet/load/{model.name}"
        assert opened.post(url).status_code == 200
        assert all(is_let_in(server, listener, goes) for listener in server.addresses)
        paths["tls_client_ca"].write_bytes(ca.cert_pem.bytes())
        for listener in server.addresses:
            wait_until(lambda at=listener: not is_let_in(server, at, goes), f"{listener} refuses the authority")  # type: ignore[misc]
            assert is_let_in(server, listener, stays)
        assert opened.post(url).status_code == 200


def test_the_audit_log_names_clients_by_their_certificates(
    model: Model, serve: Serve, tmp_path: Path, ca: trustme.CA
) -> None:
    """By the common name, else by the first alternative name; beside the token's name, and for refused calls too.

    A name with spaces and line ends stays one word.
    """
    paths = issue(ca, tmp_path)
    authority = paths["tls_client_ca"]
    names = {
        "email:desk@example.org": show_certificate(authority, ca, "desk@example.org"),
        "CN:desk-au": show_certificate(authority, ca, "desk@example.org", common_name="desk-au"),
        r"CN:a\x0astatus\x3d200\x20b": show_certificate(
            authority, ca, "desk@example.org", common_name="a\nstatus=200 b"
        ),
    }
    http = httpx.Client(verify=names["CN:desk-au"], timeout=PATIENCE_S, trust_env=False, headers=make_bearer("all"))
    with serve(http=http, tokens=write_tokens(tmp_path), **paths) as server:
        url = f"{server.addresses['management']}/fleet/load/{model.name}"
        for context in names.values():
            with httpx.Client(verify=context, timeout=PATIENCE_S, trust_env=False) as client:
                assert client.post(url, headers=make_bearer("ops")).status_code == 200
                assert client.post(url).status_code == 401
        expected = [pair for name in names for pair in ((name, "ops", 200), (name, "-", 401))]
        wait_until(lambda: server.said().count('"management_call"') == len(expected), "all calls are in the log")
        lines = [json.loads(line) for line in server.said().splitlines() if '"management_call"' in line]
        assert [(line["certificate"], line["token"], line["status"]) for line in lines] == expected


# --- the start ------------------------------------------------------------------------------------------------------


def refused_start(folder: Path, *flags: str) -> str:
    """What a server says that cannot start."""
    command = [sys.executable, "-m", "server.cli.main", "serve", "--store", str(folder), "--workers", "1", *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE_S, cwd=folder)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


@pytest.mark.parametrize(("listener", "scope"), [("management", "manage"), ("metrics", "metrics")])
def test_an_operators_listener_is_not_public_without_protection(tmp_path: Path, listener: str, scope: str) -> None:
    """Named on a public address it needs a token of its scope or mTLS: another scope's token does not suffice."""
    other = tmp_path / "other.toml"
    name = "desk"
    digest = hashlib.sha256(b"x").hexdigest()
    other.write_text(f'[[tokens]]\nname = "{name}"\nsha256 = "{digest}"\nscopes = ["invoke"]\n')
    for more in ((), ("--tokens", str(other))):
        said = refused_start(tmp_path, f"--{listener}-host", "0.0.0.0", *more)
        assert f"other hosts could use the {listener} listener at 0.0.0.0 without a token" in said
        assert f"one of the scope {scope}" in said


def test_clients_are_not_shown_the_stores_path_nor_what_files_hold(s3: S3Server, tmp_path: Path) -> None:
    """Of a folder with no such model, a file that is no archive, a link out of it, and a file that may not be read:
    clients and operators are told the model and what kind of store it is, and the log has the path.
    """
    folder = tmp_path / "very-private" / "models"
    folder.mkdir(parents=True)
    (folder / "text.mar").write_text("hunter2 is the password")
    (tmp_path / "outside.txt").write_text("hunter2")
    (folder / "link.mar").symlink_to(tmp_path / "outside.txt")
    (folder / "loop.mar").symlink_to("loop.mar")
    (folder / "folder.mar").mkdir()
    (folder / "file").write_text("hunter2")
    names = ["none.mar", "text.mar", "link.mar", "loop.mar", "folder.mar", "file/below.mar", f"{'x' * 300}.mar"]
    with run_server(s3, tmp_path, str(folder)) as server:
        for name in names:
            said = server.post(name).text + server.fleet("load", name).text
            assert name in said
            assert "very-private" not in said, said
            assert "hunter2" not in said, said
        listed = json.dumps(server.models())
        assert "very-private" not in listed
        assert "hunter2" not in listed
        wait_until(lambda: "very-private/models" in server.said(), "the log has the path")
        assert "hunter2" not in server.said()

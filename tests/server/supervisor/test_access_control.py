"""The allowed addresses of the operators' listeners, and the files of secrets that the start refuses."""

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest
import trustme
from starlette.responses import JSONResponse
from structlog.testing import capture_logs

from server.access.sites import Sites
from server.access.tokens import Scope, TokenFile, hash_token
from server.settings import Settings
from server.supervisor.access_control import AccessControl, listener_hosts, read_secrets


def make_settings(**values: object) -> Settings:
    """Settings with these values."""
    return Settings.model_validate({"store": "models", **values})


def write_tokens(folder: Path, *scopes: str) -> Path:
    """A file with a token of each scope."""
    path = folder / "tokens.toml"
    digest = hash_token(b"x")
    rows = (f'[[tokens]]\nname = "{scope}"\nsha256 = "{digest}"\nscopes = ["{scope}"]\n' for scope in scopes)
    path.write_text("".join(rows))
    return path


@pytest.mark.parametrize(
    ("values", "hosts"),
    [
        ({}, ("127.0.0.1", "127.0.0.1", "127.0.0.1")),
        ({"host": "::1"}, ("::1", "::1", "::1")),
        ({"host": "0.0.0.0"}, ("0.0.0.0", "127.0.0.1", "127.0.0.1")),
        ({"inference_host": "10.0.0.1"}, ("10.0.0.1", "127.0.0.1", "127.0.0.1")),
        ({"host": "10.0.0.1", "metrics_host": "10.0.0.2"}, ("10.0.0.1", "127.0.0.1", "10.0.0.2")),
    ],
)
def test_unnamed_listeners_stay_on_loopback(values: dict[str, str], hosts: tuple[str, ...]) -> None:
    """Whatever `host` is: it is the inference listener's."""
    assert tuple(listener_hosts(make_settings(**values)).values()) == hosts


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "fleet.example"])
def test_a_named_public_listener_must_be_protected(host: str, tmp_path: Path) -> None:
    """By a token of its own scope, or by clients' certificates."""
    for listener, scope in (("management", "manage"), ("metrics", "metrics")):
        values = {f"{listener}_host": host}
        with pytest.raises(ValueError, match=rf"the {listener} listener at {host} .*of the scope {scope}"):
            read_secrets(make_settings(**values))
        others = {"invoke", "manage", "metrics"} - {scope}
        with pytest.raises(ValueError, match=f"of the scope {scope}"):
            read_secrets(make_settings(**values, tokens=write_tokens(tmp_path, *others)))
        read_secrets(make_settings(**values, tokens=write_tokens(tmp_path, scope)))
    ca = trustme.CA()
    made = ca.issue_cert("127.0.0.1").private_key_and_cert_chain_pem
    made.write_to_path(str(tmp_path / "server.pem"))
    ca.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    own = {"tls_certificate": tmp_path / "server.pem"}
    with pytest.raises(ValueError, match="other hosts could use"):
        read_secrets(make_settings(management_host=host, **own))
    read_secrets(make_settings(management_host=host, tls_client_ca=tmp_path / "ca.pem", **own))


@pytest.mark.parametrize("name", ["tls_key", "tls_client_ca"])
def test_half_of_tls_is_refused(name: str, tmp_path: Path) -> None:
    """A key or an authority without a certificate would leave the listeners on plain HTTP."""
    with pytest.raises(ValueError, match=f"{name} needs tls_certificate"):
        read_secrets(make_settings(**{name: tmp_path / "x.pem"}))


def test_keys_of_a_file_join_the_others(tmp_path: Path) -> None:
    """A key that is given twice is as the setting says; a file that every user can read is a warning."""
    path = tmp_path / "keys.toml"
    path.write_text('AKIA = "from-file"\nOTHER = "other"\n')
    path.chmod(0o600)
    with capture_logs() as logs:
        found = read_secrets(make_settings(access_keys_file=path, access_keys={"AKIA": "given"}))
    assert {key: secret.get_secret_value() for key, secret in found.access_keys.items()} == {
        "AKIA": "given", "OTHER": "other",
    }  # fmt: skip
    assert (logs, "from-file" in repr(found), "other" in repr(found.access_keys)) == ([], False, False)
    path.chmod(0o644)
    with capture_logs() as logs:
        read_secrets(make_settings(access_keys_file=path))
    assert [line["event"] for line in logs] == ["secrets_readable"]


@pytest.mark.parametrize(
    ("text", "mode", "said"),
    [
        ('AKIA = "hidden', 0o600, "must be TOML"),
        ("AKIA = hidden", 0o600, "must be TOML"),
        ('AKIA = ["hidden"]', 0o600, "must be TOML"),
        ('AKIA = ""\nB = "hidden"', 0o600, "must be TOML"),
        ("", 0o600, "must be TOML"),
        ('AKIA = "hidden"', 0o620, "can be written by others"),
        (None, 0, "cannot be read"),
    ],
)
def test_files_of_keys_that_are_wrong(text: str | None, mode: int, said: str, tmp_path: Path) -> None:
    """The message names the file and the setting, and repeats nothing of the file."""
    path = tmp_path / "keys.toml"
    if text is not None:
        path.write_text(text)
        path.chmod(mode)
    with pytest.raises(ValueError, match=said) as refused:
        read_secrets(make_settings(access_keys_file=path))
    assert str(path) in str(refused.value)
    assert "(access_keys_file)" in str(refused.value)
    assert "hidden" not in str(refused.value)


def test_an_alias_is_for_tokens_of_all_models(tmp_path: Path) -> None:
    """A token of `au/` may roll back a model of it, but set no alias even there, which may stand for any model, and
    register no name, which may so too.
    """
    path, calls = tmp_path / "tokens.toml", []
    path.write_text(f'[[tokens]]\nname = "au"\nsha256 = "{hash_token(b"x")}"\nscopes = ["manage"]\nmodels = ["au/"]\n')

    async def answer_all(scope: Any, receive: Any, send: Any) -> None:
        calls.append((scope["method"], scope["path"]))
        await JSONResponse({})(scope, receive, send)

    checked = AccessControl(answer_all, Scope.MANAGE, Sites(["127.0.0.1"], []), TokenFile(path))
    asked = [
        ("POST", "/fleet/rollback/au/a.mar", 200), ("POST", "/fleet/rollback/de/a.mar", 403),
        ("POST", "/fleet/alias/au/a@stable", 403), ("DELETE", "/fleet/alias/au/a@stable", 403),
        ("GET", "/fleet/aliases", 403), ("POST", "/fleet/events", 403),
        ("POST", "/models", 403), ("PUT", "/models/au/a", 403), ("DELETE", "/models/au/a", 403),
        ("GET", "/models", 403),
    ]  # fmt: skip
    for method, where, status in asked:
        assert asyncio.run(ask_checked(checked, method, where)) == status, (method, where)
    assert calls == [("POST", "/fleet/rollback/au/a.mar")]


async def ask_checked(app: AccessControl, method: str, path: str) -> int:
    """The status of a request with the token, as a listener would make it."""
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
        return (await client.request(method, path, headers={"Authorization": "Bearer x"})).status_code

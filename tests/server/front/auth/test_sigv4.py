"""Signatures are checked against botocore's own signer, as boto3 uses it, and against everything that is not one."""

import datetime as dt
from collections.abc import Mapping
from urllib.parse import quote

import pytest
from botocore.auth import SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from hypothesis import given
from hypothesis import strategies as st

from server.errors import Refused, Situation
from server.front.auth import sigv4
from server.front.auth.sigv4 import Signatures

KEYS = {"AKIAFLEET": "wJalr/secret+key", "AKIAOTHER": "other"}
PATH = "/endpoints/fleet/invocations"
BODY = b'{"instances": []}'
HOSTILE = [
    "a b+c%/d=e.mar",
    "%2e%2e/%252f.mar",
    "é/ü ß.mar",
    "a//b/./c.mar",
    "semi;colon,comma.mar",
    "*~!'()&=?#[]@.mar",
]

#: method, path as the application sees it, query as on the wire, headers, body
Asked = tuple[str, str, bytes, dict[bytes, bytes], bytes]


def sign(
    *,
    method: str = "POST",
    path: str = PATH,
    query: str = "",
    headers: Mapping[str, str] | None = None,
    body: bytes = BODY,
    key: str = "AKIAFLEET",
    secret: str = KEYS["AKIAFLEET"],
    service: str = "sagemaker",
) -> Asked:
    """A request as botocore signs and sends it, and as a front then sees it."""
    url = f"http://fleet:8080{quote(path)}" + (f"?{query}" if query else "")
    request = AWSRequest(method=method, url=url, data=body, headers={"Content-Type": "application/json"})
    for name, value in (headers or {}).items():
        request.headers[name] = value
    SigV4Auth(Credentials(key, secret), service, "eu-central-1").add_auth(request)
    sent = {"host": "fleet:8080", **{name.lower(): value for name, value in request.headers.items()}}
    return method, path, query.encode(), {k.encode("latin-1"): v.encode("latin-1") for k, v in sent.items()}, body


def check(asked: Asked) -> str:
    """Empty when the request is let in, else why it is not."""
    try:
        Signatures(KEYS).check(*asked)
    except Refused as refused:
        return str(refused) if refused.situation is Situation.BAD_SIGNATURE else repr(refused.situation)
    return ""


@pytest.mark.parametrize("key", KEYS)
def test_what_botocore_signs_is_let_in(key: str) -> None:
    """With each of the server's keys, for any service, method and body."""
    assert check(sign(key=key, secret=KEYS[key])) == ""
    assert check(sign(key=key, secret=KEYS[key], service="execute-api", method="GET", body=b"")) == ""


@pytest.mark.parametrize("name", HOSTILE)
def test_odd_names_are_let_in(name: str) -> None:
    """In the path, in the query and, as far as HTTP allows, in a header."""
    assert check(sign(path=f"/v1/models/{name}:predict")) == ""
    assert check(sign(query=f"{quote(name, safe='')}={quote(name, safe='')}&flag=&model=b")) == ""
    assert check(sign(headers={"X-Amzn-SageMaker-Target-Model": quote(name, safe="%")})) == ""
    assert check(sign(headers={"X-Amzn-SageMaker-Target-Model": f"  {quote(name)}   {quote(name)} "})) == ""


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30), st.binary(max_size=100))
def test_any_path_and_body_are_let_in(name: str, body: bytes) -> None:
    """Whatever a client may put there: its signature and ours are over the same bytes."""
    assert check(sign(path=f"/{name}", query=f"q={quote(name, safe='')}", body=body)) == ""


def changed(asked: Asked, **headers: str) -> Asked:
    """The request with some headers replaced; `_` stands for `-`."""
    method, path, query, sent, body = asked
    new = {name.replace("_", "-").encode(): value.encode() for name, value in headers.items()}
    return method, path, query, {**sent, **new}, body


@pytest.mark.parametrize("place", range(5))
def test_a_request_that_was_changed_is_refused(place: int) -> None:
    """Method, path, query, a signed header or the body: each is covered by the signature."""
    signed = sign(query="a=1&b=2", headers={"X-Amzn-SageMaker-Target-Model": "a.mar"})
    assert check(signed) == ""
    others: list[Asked] = [
        ("PUT", *signed[1:]),
        (signed[0], PATH + "/", *signed[2:]),
        (*signed[:2], b"a=1&b=3", *signed[3:]),
        changed(signed, x_amzn_sagemaker_target_model="b.mar"),
        (*signed[:4], BODY + b" "),
    ]
    assert check(others[place]) == "the signature does not match the request"


def test_a_wrong_secret_or_key_is_refused() -> None:
    """A secret that is not the key's, though it is one of ours, and a key that is not ours."""
    assert check(sign(secret="other")) == "the signature does not match the request"
    assert check(sign(key="AKIANOBODY")) == "the access key is not one of this server's"


@pytest.mark.parametrize(("was", "becomes"), [("eu-central-1", "us-east-1"), ("sagemaker", "execute-api")])
def test_the_scope_is_signed_too(was: str, becomes: str) -> None:
    """Region and service of the credential."""
    signed = sign()
    whole = signed[3][b"authorization"].decode()
    assert was in whole
    other = changed(signed, authorization=whole.replace(was, becomes))
    assert check(other) == "the signature does not match the request"


@pytest.mark.parametrize(
    "authorization",
    ["", "Bearer abc", "AWS4-HMAC-SHA256 Credential=AKIAFLEET", "{} ", "x{}", "{}0", "AWS4-HMAC-SHA512 {}"],
)
def test_what_is_no_signature_is_refused(authorization: str) -> None:
    """The header is read as a whole, in the one form that clients send."""
    signed = sign()
    whole = signed[3][b"authorization"].decode()
    assert "wants requests signed" in check(changed(signed, authorization=authorization.format(whole)))


def test_host_and_date_must_be_signed() -> None:
    """Else a request could be sent again later, or to another server."""
    signed = sign()
    whole = signed[3][b"authorization"].decode()
    assert "SignedHeaders=content-type;host;x-amz-date," in whole
    for without in ("content-type;host", "content-type;x-amz-date"):
        other = whole.replace("content-type;host;x-amz-date", without)
        assert "must cover host and x-amz-date" in check(changed(signed, authorization=other))


@pytest.mark.parametrize(
    ("minutes", "fresh"), [(-15, True), (-15.1, False), (0, True), (15, True), (15.1, False), (24 * 60, False)]
)
def test_a_signature_is_good_for_fifteen_minutes(
    monkeypatch: pytest.MonkeyPatch, minutes: float, *, fresh: bool
) -> None:
    """Either way, since clocks differ; the bounds themselves are let in."""
    signed = sign()
    then = dt.datetime.strptime(signed[3][b"x-amz-date"].decode(), "%Y%m%dT%H%M%SZ").replace(tzinfo=dt.UTC)
    monkeypatch.setattr(sigv4, "dt", _Clock(then + dt.timedelta(minutes=minutes)))
    assert (check(signed) == "") is fresh


class _Clock:
    """The module `datetime`, at another time."""

    UTC, timedelta = dt.UTC, dt.timedelta

    def __init__(self, now: dt.datetime) -> None:
        class datetime(dt.datetime):  # noqa: N801 -- the name in the module
            @classmethod
            def now(cls, tz: dt.tzinfo | None = None) -> "datetime":
                return cls.fromtimestamp(now.timestamp(), tz)

        self.datetime = datetime


@pytest.mark.parametrize("date", ["", "yesterday", "20260101", "20260101T000000+0000"])
def test_a_date_that_is_none_is_refused(date: str) -> None:
    """Also where the header is missing."""
    assert "must cover host and x-amz-date" in check(changed(sign(), x_amz_date=date))


def test_the_hash_of_the_body_must_be_its_own() -> None:
    """`x-amz-content-sha256` takes part in the signature: it must be of this body, though the client has signed it."""
    asked = sign(headers={"X-Amz-Content-SHA256": "0" * 64})
    assert "not the hash of the body" in check(asked)
    assert "not the hash of the body" in check(sign(headers={"X-Amz-Content-SHA256": "UNSIGNED-PAYLOAD"}))


def test_reprs_show_no_secret() -> None:
    """How many keys, not which."""
    assert repr(Signatures(KEYS)) == "<Signatures of 2 keys>"

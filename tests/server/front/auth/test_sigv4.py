"""Signatures of the signer of botocore are accepted for all names; any other is refused with a reason."""

import datetime as dt
import hashlib
from collections.abc import Mapping
from urllib.parse import quote

import pytest
from botocore.auth import SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from hypothesis import given
from hypothesis import strategies as st

from server.errors import Refused, Situation
from server.front.auth.sigv4 import MAX_AGE, Signatures

NOW = dt.datetime(2026, 1, 2, 3, 4, 5, tzinfo=dt.UTC)
KEYS = {"AKIA": "secret/+="}
TARGET = b"x-amzn-sagemaker-target-model"
PATH = "/endpoints/fleet/invocations"
Sent = dict[bytes, bytes]


def sign(
    body: bytes = b"{}",
    headers: Mapping[str, str] | None = None,
    *,
    url: str = f"http://fleet:8080{PATH}",
    key: str = "AKIA",
    secret: str = KEYS["AKIA"],
    service: str = "sagemaker",
    region: str = "us-east-1",
    when: dt.datetime = NOW,
) -> Sent:
    """A request's headers as they are on the wire, signed by botocore."""
    request = AWSRequest("POST", url, headers=dict(headers or {}), data=body)
    request.context["timestamp"] = when.strftime("%Y%m%dT%H%M%SZ")
    signer = SigV4Auth(Credentials(key, secret), service, region)
    signer._modify_request_before_signing(request)
    signature = signer.signature(signer.string_to_sign(request, signer.canonical_request(request)), request)
    signer._inject_signature_to_request(request, signature)
    sent = {name.lower().encode(): value.encode() for name, value in request.headers.items()}
    return {b"host": url.split("/")[2].encode(), **sent}


def check(
    sent: Mapping[bytes, bytes], body: bytes = b"{}", *, query: bytes = b"", region: str | None = None
) -> str | None:
    """None where the request is taken, else why not."""
    try:
        assert Signatures(KEYS, region, lambda: NOW).check("POST", PATH, query, sent, body) in KEYS
    except Refused as refused:
        return str(refused) if refused.situation is Situation.BAD_SIGNATURE else f"wrong situation: {refused!r}"
    return None


NAMES = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=40)
VALUES = st.binary(max_size=60).filter(lambda raw: not set(raw) & {0, 10, 13})


@given(name=NAMES, attributes=NAMES, body=st.binary(max_size=50))
def test_what_botocore_signs_is_taken(name: str, attributes: str, body: bytes) -> None:
    """Names of any script, with runs of spaces, marks that combine or turn the text's direction."""
    headers = {"X-Amzn-SageMaker-Target-Model": name, "X-Amzn-SageMaker-Custom-Attributes": attributes}
    assert check(sign(body, headers), body) is None


@given(name=NAMES, other=NAMES)
def test_another_name_is_refused(name: str, other: str) -> None:
    """The model is part of what is signed; runs of white space count as one space in every signature of this kind."""
    sent = sign(headers={"X-Amzn-SageMaker-Target-Model": name})
    same = " ".join(name.split()) == " ".join(other.split())
    assert (check({**sent, TARGET: other.encode()}) is None) is same


@pytest.mark.slow
@given(pairs=st.lists(st.tuples(NAMES, NAMES), max_size=4))
def test_queries_are_part_of_it(pairs: list[tuple[str, str]]) -> None:
    """Whatever their characters; one that was not signed is refused."""
    query = "&".join(f"{quote(k, safe='')}={quote(v, safe='')}" for k, v in pairs)
    sent = sign(url=f"http://fleet:8080{PATH}?{query}")
    assert check(sent, query=query.encode()) is None
    assert check(sent, query=f"{query}&more=1".encode()) is not None


@given(host=VALUES, name=VALUES, date=VALUES, authorization=VALUES)
def test_any_header_bytes_are_refused_not_an_error(host: bytes, name: bytes, date: bytes, authorization: bytes) -> None:
    """Each header in turn is replaced by rubbish: the answer is a refusal with a reason."""
    sent = sign(headers={"X-Amzn-SageMaker-Target-Model": "m.mar"})
    rubbish = {b"host": host, TARGET: name, b"x-amz-date": date, b"authorization": authorization}
    for header, value in rubbish.items():
        if b" ".join(value.split()) != sent[header]:
            assert check({**sent, header: value})


@pytest.mark.parametrize("host", ["[", "[::1", "[]:80", "a b", "", "\u2100", "x" * 5000, "a@b", "//", "%zz"])
def test_odd_hosts_are_no_error(host: str) -> None:
    """A host that no URL could have is refused where it was not signed, and taken where it was."""
    assert check({**sign(), b"host": host.encode()}) == "the signature does not match the request"
    assert check(sign(headers={"Host": host}) | {b"host": host.encode()}) is None


def test_headers_that_botocore_does_not_sign_may_be_signed() -> None:
    """Other clients sign User-Agent too."""
    names = "host;user-agent;x-amz-date"
    sent = {b"host": b"fleet", b"user-agent": b"curl/8  x", b"x-amz-date": NOW.strftime("%Y%m%dT%H%M%SZ").encode()}
    signer = SigV4Auth(Credentials("AKIA", KEYS["AKIA"]), "sagemaker", "us-east-1")
    request = AWSRequest("POST", f"http://fleet{PATH}", data=b"{}")
    request.context["timestamp"] = sent[b"x-amz-date"].decode()
    lines = f"host:fleet\nuser-agent:curl/8 x\nx-amz-date:{request.context['timestamp']}\n"
    canonical = f"POST\n{PATH}\n\n{lines}\n{names}\n{hashlib.sha256(b'{}').hexdigest()}"
    signature = signer.signature(signer.string_to_sign(request, canonical), request)
    scope = f"AKIA/{NOW:%Y%m%d}/us-east-1/sagemaker/aws4_request"
    written = f"AWS4-HMAC-SHA256 Credential={scope}, SignedHeaders={names}, Signature={signature}"
    assert check({**sent, b"authorization": written.encode()}) is None
    assert check({**sent, b"authorization": written.encode(), b"user-agent": b"other"}) is not None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"key": "OTHER"}, "the access key is not one"),
        ({"secret": "wrong"}, "does not match"),
        ({"service": "s3"}, "must name the service sagemaker, not s3"),
        ({"when": NOW - MAX_AGE - dt.timedelta(seconds=1)}, "15 minutes"),
        ({"when": NOW + MAX_AGE + dt.timedelta(seconds=1)}, "15 minutes"),
    ],
)
def test_a_scope_that_is_not_ours_is_refused(changes: dict[str, object], reason: str) -> None:
    """Key, secret, service and age, each with its reason."""
    said = check(sign(**changes))  # type: ignore[arg-type]
    assert said is not None
    assert reason in said


def test_the_age_at_its_limit_is_taken() -> None:
    """15 minutes early or late, not a second more (above)."""
    assert check(sign(when=NOW - MAX_AGE)) is None
    assert check(sign(when=NOW + MAX_AGE)) is None


def test_the_scope_is_of_the_day_of_the_date() -> None:
    """A signature of yesterday's key is not one for a date of today."""
    sent = sign()
    yesterday = sent[b"authorization"].replace(b"/20260102/", b"/20260101/")
    assert check(
        {**sent, b"authorization": yesterday}
    ) == "the credential's scope is of 20260101, but x-amz-date is " + ("20260102T030405Z")


def test_the_region_where_one_is_configured() -> None:
    """Any region, or the one that the operator names."""
    sent = sign(region="eu-central-1")
    assert check(sent) is None
    assert check(sent, region="eu-central-1") is None
    assert check(sent, region="us-east-1") == "the credential's scope must name the region us-east-1, not eu-central-1"


@pytest.mark.parametrize("name", [TARGET, b"x-amzn-sagemaker-custom-attributes", b"x-amz-security-token"])
def test_what_changes_the_meaning_must_be_signed(name: bytes) -> None:
    """A header that somebody on the way has added is refused by name."""
    assert check({**sign(), name: b"added.mar"}) == f"the signature must cover {name.decode()}"


def test_what_proxies_add_need_not_be_signed() -> None:
    """Trace ids and forwarding headers come after the signature."""
    assert check({**sign(), b"x-amzn-trace-id": b"Root=1", b"x-forwarded-for": b"::1", b"x-amz-cf-id": b"a"}) is None


def test_a_name_in_latin_1_is_refused_with_the_reason() -> None:
    """The message says which header and which encoding."""
    assert check({**sign(), TARGET: "caf\xe9.mar".encode("latin-1")}) == (
        "the header x-amzn-sagemaker-target-model is not UTF-8, and a signature must cover it"
    )


def test_a_body_that_is_not_the_signed_one_is_refused() -> None:
    """With or without the header that has its hash."""
    hashed = {"X-Amz-Content-SHA256": hashlib.sha256(b"{}").hexdigest()}
    assert check(sign(headers=hashed)) is None
    assert check(sign(), b"{ }") == "the signature does not match the request"
    assert check(sign(headers=hashed), b"{ }") == "x-amz-content-sha256 is not the hash of the body"


@given(path=st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=30))
def test_paths_are_part_of_it(path: str) -> None:
    """Whatever their characters, as a client quotes them and the front unquotes them."""
    sent = sign(url=f"http://fleet:8080/{quote(path)}")
    Signatures(KEYS, None, lambda: NOW).check("POST", f"/{path}", b"", sent, b"{}")
    with pytest.raises(Refused, match="does not match"):
        Signatures(KEYS, None, lambda: NOW).check("POST", f"/{path}/more", b"", sent, b"{}")
    with pytest.raises(Refused, match="does not match"):
        Signatures(KEYS, None, lambda: NOW).check("PUT", f"/{path}", b"", sent, b"{}")


@pytest.mark.parametrize(
    "written",
    ["", "Bearer abc", "AWS4-HMAC-SHA256 Credential=AKIA", "{} ", "x{}", "{}0", "AWS4-HMAC-SHA512 {}"],
)
def test_what_is_no_signature_is_refused(written: str) -> None:
    """The header is read as a whole, in the one form that clients send."""
    sent = sign()
    said = check({**sent, b"authorization": written.format(sent[b"authorization"].decode()).encode()})
    assert said == "this server wants requests signed with AWS Signature Version 4"


@pytest.mark.parametrize("date", ["", "yesterday", "20260102", "20260102T030405+0000", "20260102T030460Z"])
def test_a_date_that_is_none_is_refused(date: str) -> None:
    """Also where the header is missing."""
    said = check({**sign(), b"x-amz-date": date.encode()})
    assert said is not None
    assert "15 minutes old" in said


@pytest.mark.parametrize("left_out", ["host", "x-amz-date"])
def test_host_and_date_must_be_signed(left_out: str) -> None:
    """Else a request could be sent again later, or to another server."""
    sent = sign()
    names = "host;x-amz-date".replace(left_out, "").strip(";")
    written = sent[b"authorization"].decode().replace("host;x-amz-date", names)
    assert check({**sent, b"authorization": written.encode()}) == f"the signature must cover {left_out}"


def test_reprs_show_no_secret() -> None:
    """How many keys, not which."""
    assert repr(Signatures(KEYS)) == "<Signatures of 1 keys>"

"""AWS Signature Version 4, checked only where the operator configures keys (`access_keys`). Pure but for the clock.

The signature is computed again by botocore over the headers that the client signed. The age of the date bounds replays.
Source: "Authenticating Requests (AWS Signature Version 4)" of the AWS documentation. Header values are text in UTF-8,
as botocore sends and signs them.
"""

import datetime as dt
import hashlib
import hmac
import re
from collections.abc import Callable, Iterable, Mapping
from urllib.parse import parse_qsl, quote

from botocore.auth import SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.compat import HTTPHeaders
from botocore.credentials import Credentials

from server.errors import Refused, Situation

MAX_AGE = dt.timedelta(minutes=15)
SERVICE = "sagemaker"  #: the signing name of boto3's `sagemaker-runtime`
_AUTHORIZATION = re.compile(
    r"AWS4-HMAC-SHA256 Credential=([^/,\s]+)/([0-9]{8})/([a-z0-9-]+)/([a-z0-9-]+)/aws4_request,\s*"
    r"SignedHeaders=([a-z0-9;\-]+),\s*Signature=([0-9a-f]{64})"
)
_REQUIRED = ("host", "x-amz-date")
_MEANINGFUL = ("x-amz-", "x-amzn-sagemaker-")  #: prefixes of headers that change what a request means
_UNSIGNED = frozenset({"x-amz-cf-id"})  #: added by AWS's own proxies after the client signed

Clock = Callable[[], dt.datetime]


def _now() -> dt.datetime:
    return dt.datetime.now(dt.UTC)


class Signatures:
    """The keys that this server accepts: access key -> secret. With `region`, signatures for any other are refused."""

    def __init__(self, keys: Mapping[str, str], region: str | None = None, now: Clock = _now) -> None:
        self._keys, self._region, self._now = dict(keys), region, now

    def __repr__(self) -> str:
        """For example `<Signatures of 2 keys>`."""
        return f"<Signatures of {len(self._keys)} keys>"

    def check(self, method: str, path: str, query: bytes, headers: Mapping[bytes, bytes], body: bytes) -> str:
        """Check a request as it was sent: `path` is decoded, `headers` have lower-case names. The key that signed it.

        Raises Refused(BAD_SIGNATURE) unless one of the keys signed it within 15 minutes, for this service and region,
        with every header that changes its meaning.
        """
        text = _decode(headers)
        found = _AUTHORIZATION.fullmatch(text.get("authorization", ""))
        if found is None:
            raise _refuse_signature("this server wants requests signed with AWS Signature Version 4")
        key, day, region, service, signed, signature = found.groups()
        secret = self._keys.get(key)
        if secret is None:
            raise _refuse_signature("the access key is not one of this server's")
        names = signed.split(";")
        self._check_scope(text.get("x-amz-date", ""), day, region, service)
        _check_signed(names, text)
        digest = hashlib.sha256(body).hexdigest()
        if text.get("x-amz-content-sha256", digest) != digest:
            raise _refuse_signature("x-amz-content-sha256 is not the hash of the body")
        request = AWSRequest(method=method, url=_rebuild_url(path, query), data=body)
        for name in names:
            request.headers[name] = text[name]
        request.context["timestamp"] = text["x-amz-date"]
        auth = _Verifier(Credentials(key, secret), service, region)
        expected = auth.signature(auth.string_to_sign(request, auth.canonical_request(request)), request)
        if not hmac.compare_digest(expected, signature):
            raise _refuse_signature("the signature does not match the request")
        return key

    def _check_scope(self, date: str, day: str, region: str, service: str) -> None:
        """That the credential's scope is the request's own. Raises Refused."""
        if not self._is_fresh(date):
            raise _refuse_signature("the signature must cover x-amz-date, and be at most 15 minutes old")
        if day != date[:8]:
            raise _refuse_signature(f"the credential's scope is of {day}, but x-amz-date is {date}")
        if service != SERVICE:
            raise _refuse_signature(f"the credential's scope must name the service {SERVICE}, not {service[:80]}")
        if self._region is not None and region != self._region:
            raise _refuse_signature(f"the credential's scope must name the region {self._region}, not {region[:80]}")

    def _is_fresh(self, date: str) -> bool:
        if re.fullmatch(r"[0-9]{8}T[0-9]{6}Z", date) is None:
            return False
        try:
            then = dt.datetime.strptime(date, "%Y%m%dT%H%M%SZ").replace(tzinfo=dt.UTC)
        except ValueError:
            return False
        return abs(self._now() - then) <= MAX_AGE


class _Verifier(SigV4Auth):  # type: ignore[misc]  # botocore has no types
    """Botocore's signer over all headers it is given: other clients sign some that botocore itself never does."""

    def headers_to_sign(self, request: AWSRequest) -> HTTPHeaders:
        """All of the request's."""
        found = HTTPHeaders()
        for name, value in request.headers.items():
            found[name.lower()] = value
        return found


def _decode(headers: Mapping[bytes, bytes]) -> dict[str, str]:
    """The headers as text, those that are not UTF-8 left out. Raises Refused for one that a signature must cover."""
    text = {}
    for raw, value in headers.items():
        name = raw.decode("latin-1")
        try:
            text[name] = value.decode()
        except UnicodeDecodeError:
            if name.startswith(_MEANINGFUL) or name in _REQUIRED:
                raise _refuse_signature(f"the header {name} is not UTF-8, and a signature must cover it") from None
    return text


def _check_signed(names: Iterable[str], text: Mapping[str, str]) -> None:
    """That the signature covers what it must, and nothing that was not sent. Raises Refused."""
    signed = set(names)
    absent = sorted(signed - text.keys())
    if absent:
        raise _refuse_signature(f"the signature covers the header {absent[0][:80]}, which is absent or not UTF-8")
    needed = {name for name in text if name.startswith(_MEANINGFUL)} - _UNSIGNED
    missing = sorted(needed.union(_REQUIRED) - signed)
    if missing:
        raise _refuse_signature(f"the signature must cover {missing[0][:80]}")


def _rebuild_url(path: str, query: bytes) -> str:
    """The request's URL for botocore. The host is not in it: the signed header is what counts."""
    pairs = parse_qsl(query.decode("latin-1"), keep_blank_values=True)
    tail = "&".join(f"{quote(k, safe='')}={quote(v, safe='')}" for k, v in pairs)
    return f"http://host{quote(path)}" + (f"?{tail}" if tail else "")


def _refuse_signature(message: str) -> Refused:
    return Refused(Situation.BAD_SIGNATURE, message)

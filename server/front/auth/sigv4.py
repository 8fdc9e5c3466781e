"""AWS Signature Version 4, checked only where the operator configures keys (`access_keys`). Pure but for the clock.

The signature is computed again by botocore over the headers the client signed; replay is bounded by the date's age.
"""

import datetime as dt
import hashlib
import hmac
import re
from collections.abc import Mapping
from urllib.parse import parse_qsl, quote

from botocore.auth import SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

from server.errors import Refused, Situation

MAX_AGE = dt.timedelta(minutes=15)
_AUTHORIZATION = re.compile(
    r"AWS4-HMAC-SHA256 Credential=([^/,]+)/(\d{8})/([^/,]+)/([^/,]+)/aws4_request,\s*"
    r"SignedHeaders=([a-z0-9;\-]+),\s*Signature=([0-9a-f]{64})"
)


class Signatures:
    """The keys this server accepts: access key -> secret."""

    def __init__(self, keys: Mapping[str, str]) -> None:
        self._keys = dict(keys)

    def __repr__(self) -> str:
        """For example `<Signatures of 2 keys>`."""
        return f"<Signatures of {len(self._keys)} keys>"

    def check(self, method: str, path: str, query: bytes, headers: Mapping[bytes, bytes], body: bytes) -> None:
        """Raises Refused(BAD_SIGNATURE) unless the request is signed by one of our keys within 15 minutes."""
        plain = {name.decode("latin-1"): value.decode("latin-1") for name, value in headers.items()}
        found = _AUTHORIZATION.fullmatch(plain.get("authorization", ""))
        if found is None:
            raise _refused("this server wants requests signed with AWS Signature Version 4")
        key, _, region, service, signed, signature = found.groups()
        secret = self._keys.get(key)
        date = plain.get("x-amz-date", "")
        if secret is None:
            raise _refused("the access key is not one of this server's")
        names = signed.split(";")
        if "host" not in names or "x-amz-date" not in names or not _fresh(date):
            raise _refused("the signature must cover host and x-amz-date, and be at most 15 minutes old")
        content = plain.get("x-amz-content-sha256", hashlib.sha256(body).hexdigest())
        if content != hashlib.sha256(body).hexdigest():
            raise _refused("x-amz-content-sha256 is not the hash of the body")
        request = AWSRequest(method=method, url=_url(plain["host"], path, query), data=body)
        for name in names:
            request.headers[name] = plain.get(name, "")
        request.context["timestamp"] = date
        auth = SigV4Auth(Credentials(key, secret), service, region)
        expected = auth.signature(auth.string_to_sign(request, auth.canonical_request(request)), request)
        if not hmac.compare_digest(expected, signature):
            raise _refused("the signature does not match the request")


def _fresh(date: str) -> bool:
    try:
        then = dt.datetime.strptime(date, "%Y%m%dT%H%M%SZ").replace(tzinfo=dt.UTC)
    except ValueError:
        return False
    return abs(dt.datetime.now(dt.UTC) - then) <= MAX_AGE


def _url(host: str, path: str, query: bytes) -> str:
    pairs = parse_qsl(query.decode("latin-1"), keep_blank_values=True)
    tail = "&".join(f"{quote(k, safe='')}={quote(v, safe='')}" for k, v in pairs)
    return f"http://{host}{quote(path)}" + (f"?{tail}" if tail else "")


def _refused(message: str) -> Refused:
    return Refused(Situation.BAD_SIGNATURE, message)

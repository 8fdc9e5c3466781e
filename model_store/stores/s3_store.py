"""S3 and what speaks like it: opened, listed and, where need be, read by boto3; read by obstore. Loader threads.

obstore reads with little time under the interpreter lock, but ends a listing at the first key that its own paths cannot
have (`//`, `.`, a tab), and does not read answers without Content-Length or from servers without ranges. boto3 does
both, so it lists, and reads from a server that once gave such an answer. What boto3's chain says of the endpoint, the
addressing style, the credentials and the CAs holds for both.
"""

import os
import random
import re
import ssl
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import boto3
import botocore.session
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    HTTPClientError,
    IncompleteReadError,
    ReadTimeoutError,
    ResponseStreamingError,
    SSLError,
)
from botocore.parsers import ResponseParserError
from obstore.auth.boto3 import Boto3CredentialProvider
from obstore.store import S3Store as ObstoreS3

from model_store.errors import LoadError, StoreDenied, StoreUnavailable
from model_store.names import ModelName
from model_store.stores.backend import (
    CUT,
    FAILED,
    Fetched,
    InvalidStoreUrl,
    StoredObject,
    Where,
    check_size,
    digest_version,
    explain_reply,
    strip_tag,
)
from model_store.stores.cloud_store import (
    ONE_REQUEST_BYTES,
    CloudStore,
    UnreadReply,
    explain_tls,
    make_client_options,
)

CHUNK_BYTES = 64 << 10
CONNECTIONS = 16
# botocore renews credentials that expire within 10 to 15 minutes when it is asked, so ask at least this often.
CREDENTIALS_TTL = timedelta(minutes=10)
# Where systems keep the CAs that they trust, should Python's own build look elsewhere.
SYSTEM_CAS = (
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
)
_FAILURES = (BotoCoreError, ClientError, HTTPClientError, ResponseParserError, OSError)
_CUTS = (IncompleteReadError, ResponseStreamingError)
_PASSING = ("429", "500", "502", "503", "504")  # statuses after which a retry may help

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class S3Options:
    """What `open_source` was given for s3://; None leaves it to boto3's chain."""

    timeout_s: float
    retries: int
    profile: str | None
    endpoint_url: str | None
    region: str | None


@dataclass(frozen=True, slots=True)
class TrustedCas:
    """Whose certificates are trusted. `bundle`: a PEM file that boto3's chain names; `file`: what boto3 shall use."""

    bundle: str | None
    file: str | None
    said: str  #: for messages


class S3Store:
    """See Backend. `base` is the prefix with its last slash, or empty."""

    def __init__(self, bucket: str, base: str, client: Any, cloud: CloudStore, limit: int, options: S3Options) -> None:
        self.where = cloud.where
        self._bucket, self._base = bucket, base
        self._client, self._cloud = client, cloud
        self._max_archive_bytes, self._options = limit, options
        self._obstore_reads = True  # until the server has once answered in a way that obstore does not read

    def __repr__(self) -> str:
        return f"<S3Store {self.where.full}>"

    def read(self, name: ModelName, unless: str | None) -> Fetched | None:
        """See Backend."""
        if self._obstore_reads:
            try:
                return self._cloud.read(name, unless)
            except UnreadReply:
                pass
        found = self._retry(lambda: self._read_whole(name, unless), name)
        self._obstore_reads = False
        return found

    def read_version(self, name: ModelName) -> str:
        """See Backend."""
        reply = self._retry(lambda: self._client.head_object(Bucket=self._bucket, Key=self._base + name), name)
        return strip_tag(reply.get("ETag")) or reply.get("VersionId") or ""

    def list(self, prefix: str) -> Iterator[StoredObject]:
        """See Backend."""
        further: dict[str, str] = {}
        while True:
            page = self._retry(lambda at=further: self._list_page(prefix, at), prefix)  # type: ignore[misc]
            for each in page.get("Contents", ()):
                yield StoredObject(each["Key"].removeprefix(self._base), each["Size"], strip_tag(each.get("ETag")))
            if not page.get("IsTruncated"):
                return
            token = page.get("NextContinuationToken")
            if not token or token == further.get("ContinuationToken"):
                raise self.where.explain(StoreUnavailable, FAILED, prefix, "its listing does not go on")
            further = {"ContinuationToken": token}

    def write(self, name: ModelName, data: bytes) -> str:
        """See Backend."""
        return self._cloud.write(name, data)

    def _list_page(self, prefix: str, further: dict[str, str]) -> Any:
        return self._client.list_objects_v2(Bucket=self._bucket, Prefix=self._base + prefix, **further)

    def _read_whole(self, name: ModelName, unless: str | None) -> Fetched | None:
        """One GET without a range. Raises what boto3 raises, and LoadError."""
        condition = {"IfNoneMatch": f'"{unless}"'} if unless else {}
        try:
            reply = self._client.get_object(Bucket=self._bucket, Key=self._base + name, **condition)
        except ClientError as error:
            if _get_status(error) == "304":
                return None
            raise
        try:
            if "ContentLength" in reply:
                check_size(reply["ContentLength"], self._max_archive_bytes, name, self.where)
            data = self._read_body(reply["Body"], name)
        finally:
            reply["Body"].close()
        version = strip_tag(reply.get("ETag")) or reply.get("VersionId") or digest_version(data)
        return None if version == unless else Fetched(data, version)

    def _read_body(self, body: Any, name: str) -> bytes:
        """All bytes of a body whose length may be unknown, in the time that as many ranges may take."""
        started, data = time.monotonic(), bytearray()
        while chunk := body.read(CHUNK_BYTES):
            data += chunk
            if len(data) > self._max_archive_bytes:
                break
            if time.monotonic() - started > self._options.timeout_s * (1 + len(data) / ONE_REQUEST_BYTES):
                raise self.where.explain(StoreUnavailable, FAILED, name, "timed out")
        check_size(len(data), self._max_archive_bytes, name, self.where)
        return bytes(data)

    def _retry(self, ask: Callable[[], T], name: str) -> T:
        """What `ask` returns; failures that may pass are tried again, as obstore does. Raises LoadError."""
        started, tries = time.monotonic(), 0
        while True:
            try:
                return ask()
            except _FAILURES as error:
                late = time.monotonic() - started >= self._options.timeout_s
                if late or tries == self._options.retries or not _may_pass(error):
                    raise self._explain(error, name, tries) from error
            time.sleep(random.uniform(0.5, 1.0) * min(0.05 * 2**tries, 2.0))  # noqa: S311  jitter, no secret
            tries += 1

    def _explain(self, error: Exception, name: str, tries: int) -> LoadError:
        after = f" after {tries} retries" if tries else ""
        if isinstance(error, ClientError):
            code = str(error.response.get("Error", {}).get("Code", ""))
            status = _get_status(error)
            return explain_reply(status, code, f"{status} ({code}){after}", name, self.where)
        if isinstance(error, SSLError):
            return explain_tls(_find_handshake_cause(error), self._cloud.trusted, name, self.where)
        cause = "timed out" if isinstance(error, ReadTimeoutError) else CUT if isinstance(error, _CUTS) else str(error)
        return self.where.explain(StoreUnavailable, FAILED, name, cause[:300] + after)


def open_s3(url: str, limit: int, options: S3Options) -> S3Store:
    """The store at s3://bucket/prefix. obstore is given what boto3's chain says. No request is sent.

    Raises:
        InvalidStoreUrl: an unknown profile, a bad endpoint, bucket or CA file.
        StoreDenied: boto3 finds no credentials.
    """
    parts = urlsplit(url)
    try:
        session, trusted = make_session(options.profile, options.region)
        client = _make_client(session, options, trusted)
        if "@" in urlsplit(client.meta.endpoint_url).netloc:
            raise InvalidStoreUrl(
                f"the endpoint of s3://{parts.netloc} has credentials in its URL; give them by boto3's chain"
            )
        bucket_url = _find_bucket_url(session, options, trusted, parts.netloc)
    except (BotoCoreError, ValueError) as error:
        if isinstance(error, InvalidStoreUrl):
            raise
        raise InvalidStoreUrl(f"s3://{parts.netloc} cannot be opened: {error}") from error
    where = Where(f"{url} at {client.meta.endpoint_url}", "the S3 store")
    settings = make_client_options(options.timeout_s, options.retries)
    settings["client_options"]["allow_http"] = bucket_url.startswith("http://")
    if trusted.bundle:
        settings["client_options"]["root_certificate"] = Path(trusted.bundle).read_bytes()
    prefix = "/".join(part for part in parts.path.split("/") if part)
    store = ObstoreS3(
        parts.netloc,
        prefix=prefix or None,
        endpoint=bucket_url,
        virtual_hosted_style_request=True,  # the endpoint is the bucket's, in whichever style botocore gave it
        region=client.meta.region_name,
        credential_provider=_find_credentials(session, parts.netloc),
        **settings,
    )
    cloud = CloudStore(store, where, limit, trusted.said)
    return S3Store(parts.netloc, f"{prefix}/" if prefix else "", client, cloud, limit, options)


def make_session(profile: str | None, region: str | None) -> tuple[boto3.Session, TrustedCas]:
    """boto3's chain, and the CAs that its clients are to trust (`verify`). Raises BotoCoreError, InvalidStoreUrl."""
    core = botocore.session.Session(profile=profile)
    session = boto3.Session(botocore_session=core, region_name=region)
    return session, find_trusted_cas(core.get_config_variable("ca_bundle"))


def find_trusted_cas(bundle: str | None) -> TrustedCas:
    """The CAs for both clients: `bundle` (AWS_CA_BUNDLE or the profile's), else REQUESTS_CA_BUNDLE, else the system's.

    The system's are those of SSL_CERT_FILE where it is set, and not boto3's own list: a private CA is often installed
    there. Raises InvalidStoreUrl for a file that cannot be read.
    """
    bundle = bundle or os.environ.get("REQUESTS_CA_BUNDLE") or None
    named = bundle or os.environ.get("SSL_CERT_FILE")
    if named:
        source = next((name for name in _CA_VARIABLES if os.environ.get(name) == named), "the profile's ca_bundle")
        try:
            ssl.create_default_context(cafile=named)
        except OSError as error:  # ssl.SSLError too
            cause = error.strerror or str(error)
            raise InvalidStoreUrl(f"{source} is {named!r}, which is no readable PEM file of CAs: {cause}") from error
        return TrustedCas(bundle, named, f"the CAs in {named} ({source})")
    usual = (ssl.get_default_verify_paths().cafile, *SYSTEM_CAS)
    found = next((path for path in usual if path and Path(path).is_file()), None)
    return TrustedCas(None, found, "the system's CAs")


_CA_VARIABLES = ("AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE")


def _make_client(session: boto3.Session, options: S3Options, trusted: TrustedCas, **credentials: str) -> Any:
    """A client whose one attempt is bounded like obstore's; `S3Store` retries. The profile's `s3` settings hold."""
    config = Config(
        signature_version="s3v4",
        connect_timeout=options.timeout_s / 4,
        read_timeout=options.timeout_s,
        retries={"total_max_attempts": 1},
        max_pool_connections=CONNECTIONS,
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    return session.client("s3", endpoint_url=options.endpoint_url, config=config, verify=trusted.file, **credentials)


def _find_bucket_url(session: boto3.Session, options: S3Options, trusted: TrustedCas, bucket: str) -> str:
    """The bucket's URL in the addressing style that botocore chooses, which also knows the profile's settings.

    The style cannot be read from a client; a link says it. It is made with false credentials: true ones may cost
    requests.
    """
    client = _make_client(session, options, trusted, aws_access_key_id="-", aws_secret_access_key="-")  # noqa: S106
    link = str(client.generate_presigned_url("get_object", Params={"Bucket": bucket, "Key": "k"}))
    client.close()
    return link.partition("?")[0].removesuffix("/k")


def _find_credentials(session: boto3.Session, bucket: str) -> Boto3CredentialProvider:
    try:
        return Boto3CredentialProvider(session, ttl=CREDENTIALS_TTL)
    except (BotoCoreError, ValueError) as error:
        raise StoreDenied(
            f"no credentials for s3://{bucket}: boto3's chain found none ({error}); set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, a profile, or a role"
        ) from error


def _get_status(error: ClientError) -> str:
    return str(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", ""))


def _may_pass(error: Exception) -> bool:
    if isinstance(error, ClientError):
        return _get_status(error) in _PASSING
    return not isinstance(error, SSLError | ReadTimeoutError)


def _find_handshake_cause(error: SSLError) -> str:
    found = re.search(r"\[SSL[^\]]*\] ([^(]+)", str(error))
    return found[1].strip() if found else "no TLS"

"""S3 stores as strangers run them: odd keys, private CAs, gateways that answer unlike S3."""

import os
import ssl
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Literal

import pytest
import trustme
from structlog.testing import capture_logs

from model_store.errors import ArchiveTooLarge, ModelNotFound, StoreUnavailable
from model_store.names import ModelName
from model_store.stores import cloud_store
from model_store.stores.object_store import Fetched, InvalidStoreUrl, Source, open_source
from tests.odd_s3 import BUCKET, Habits, OddS3, odd_s3
from tests.patience import PATIENCE_S
from tests.s3 import S3Server

SMALL, BIG = ModelName("au/small.mar"), ModelName("big.mar")
KEYS_OF_PROFILE = "aws_access_key_id = a\naws_secret_access_key = b\n"
ODD_KEYS = ("p//b.mar", "p/./b.mar", "p/../b.mar", "p/tab\t.mar", "p/bell\x07.mar", "p/back\\slash.mar", "p/folder/")
CHARACTERS = ("a#b?c.mar", "50%.mar", "a%2Fb.mar", "x#1", "a b+c.mar", "ü/ñ 日本.mar", "{a}|<>\"'^`[]~*&=;@!$,.mar")


@pytest.fixture
def odd(monkeypatch: pytest.MonkeyPatch) -> Iterator[OddS3]:
    """A server of odd habits, which boto3's chain leads to; requests of 64 KiB each."""
    monkeypatch.setattr(cloud_store, "ONE_REQUEST_BYTES", 1 << 16)
    with odd_s3() as server:
        lead_to(server, monkeypatch)
        yield server


def lead_to(server: OddS3, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set boto3's environment, and put two archives into the store: one of many requests."""
    keys = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1"}
    for name, value in (keys | {"AWS_ENDPOINT_URL": server.endpoint_url}).items():
        monkeypatch.setenv(name, value)
    server.objects = {SMALL: os.urandom(1_000), BIG: os.urandom((1 << 18) + 17)}


def open_odd(**options: object) -> Source:
    """The odd server's bucket."""
    return open_source(f"s3://{BUCKET}", timeout_s=PATIENCE_S, **options)  # type: ignore[arg-type]


def read(source: Source, name: ModelName, unless: str | None = None) -> Fetched:
    """The archive, which must not be `not modified`."""
    fetched = source.get(name, unless)
    assert fetched is not None
    return fetched


def test_odd_keys_are_left_out_of_a_listing(s3: S3Server, bucket: str) -> None:
    """Keys that are no model names hide no archive, whatever they are; one warning counts them, and only once."""
    kept = 0
    for key in ODD_KEYS:
        try:
            s3.put(bucket, key, b"odd")
        except Exception:  # a server may refuse such a key
            continue
        kept += 1
    for key in ("p/", "p/au/", "p/a.mar", "p/z.mar"):
        s3.put(bucket, key, b"x" if key.endswith("r") else b"")
    source = open_source(f"s3://{bucket}/p")
    with capture_logs() as logs:
        assert [listed.name for listed in source.list()] == ["a.mar", "z.mar"]
        assert [listed.name for listed in source.list()] == ["a.mar", "z.mar"]
    assert [(entry["event"], entry["keys"]) for entry in logs] == [("store_keys_left_out", kept + 1)]


@pytest.mark.slow
def test_the_same_keys_on_any_page_of_a_listing(odd: OddS3) -> None:
    """Pages of three keys with odd ones at every place; control characters, a key too long and one that is no UTF-8."""
    good = [f"m{i}.mar" for i in range(9)]
    odd.objects = dict.fromkeys([*good, *(f"m{i}//x\x01.mar" for i in range(9)), "m4" * 600, "m5/", "m6/\x7f"], b"x")
    with capture_logs() as logs:
        assert [listed.name for listed in open_odd().list()] == good
    assert logs[0]["keys"] == 12
    assert [listed.name for listed in open_odd().list("m3")] == ["m3.mar"]


def test_every_character_of_a_name_is_itself(s3: S3Server, bucket: str) -> None:
    """Names with `#`, `?`, `%`, `+`, spaces and other alphabets are written, listed, read and revalidated."""
    source = open_source(f"s3://{bucket}/some prefix%20/x+y")
    for name in map(ModelName, CHARACTERS):
        version = source.put(name, name.encode())
        assert source.get(name) == Fetched(name.encode(), version)
        assert source.get(name, unless=version) is None
    assert {listed.name for listed in source.list()} == set(CHARACTERS)
    with closing(s3.client()) as client:
        keys = {each["Key"] for each in client.list_objects_v2(Bucket=bucket)["Contents"]}
    assert keys == {f"some prefix%20/x+y/{name}" for name in CHARACTERS}


@pytest.mark.slow
@pytest.mark.parametrize(
    "habits",
    [
        Habits(tags="weak"),
        Habits(tags="none"),
        Habits(ranges=False),
        Habits(chunked=True),
        Habits(ranges=False, chunked=True, tags="none"),
        Habits(ranges=False, chunked=True, tags="weak"),
        Habits(last_modified="2024-01-01"),
    ],
    ids=str,
)
def test_what_gateways_answer_is_read(odd: OddS3, habits: Habits) -> None:
    """Weak ETags or none, no ranges, no Content-Length: archives of one request and of many come whole, twice.

    An archive without an ETag is versioned by its digest, so that it is `not modified` while it is the same.
    """
    odd.habits = habits
    source = open_odd()
    for _ in range(2):
        for name in (SMALL, BIG):
            found = read(source, name)
            assert found.data == odd.objects[name]
            assert found.version == (odd.tag(name) or "").strip('W/"') or found.version.startswith("sha256-")
            assert source.get(name, unless=found.version) is None
    with pytest.raises(ModelNotFound):
        source.get(ModelName("none.mar"))
    with pytest.raises(ArchiveTooLarge, match="more than the limit of 999"):
        open_odd(max_archive_bytes=999).get(SMALL)
    odd.objects[SMALL] = b"new"
    assert read(source, SMALL, found.version).data == b"new"


@pytest.mark.slow
@pytest.mark.parametrize("tags", ["strong", "weak", "none"])
def test_ranges_are_never_of_two_versions(odd: OddS3, tags: Literal["strong", "weak", "none"]) -> None:
    """Replaced after its first range by other bytes of the same length: with any ETag the new one is read whole."""
    odd.habits = Habits(tags=tags, swaps=1)
    second = odd.objects[BIG][::-1]
    assert read(open_odd(), BIG).data == second


def test_an_object_that_never_rests_is_given_up(odd: OddS3) -> None:
    """Replaced during each attempt: after a few the message says so."""
    odd.habits.swaps = 10**6
    with pytest.raises(StoreUnavailable, match="replaced each time"):
        open_odd().get(BIG)
    assert len(odd.requests) < 50


@pytest.mark.slow
@pytest.mark.parametrize("habits", [Habits(), Habits(ranges=False), Habits(chunked=True)], ids=str)
def test_cut_and_refused_answers_are_asked_again(odd: OddS3, habits: Habits) -> None:
    """A body cut in its middle and a 503 pass, within the retries; more of them end in an error with the cause."""
    odd.habits = habits
    source = open_odd(retries=2)
    for fault, cause in (("cuts", "connection was cut"), ("refusals", "503")):
        read(source, SMALL)
        setattr(odd.habits, fault, 2)
        assert read(source, SMALL).data == odd.objects[SMALL]
        setattr(odd.habits, fault, 10**6)
        with pytest.raises(StoreUnavailable, match=cause):
            source.get(SMALL)
        setattr(odd.habits, fault, 0)
    odd.habits.refusals = 2
    assert len(list(source.list())) == 2


@pytest.mark.slow
def test_a_listing_that_turns_in_a_circle_ends(odd: OddS3) -> None:
    """A server that gives the same page for ever is not followed for ever."""
    odd.habits.circles = True
    odd.objects = {f"{i}.mar": b"x" for i in range(9)}
    with pytest.raises(StoreUnavailable, match="does not go on"):
        list(open_odd().list())


@pytest.mark.slow
@pytest.mark.parametrize("style", ["path", "virtual", "auto"])
def test_the_addressing_style_of_the_profile_holds(
    odd: OddS3, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, style: str
) -> None:
    """`addressing_style` decides the Host of reads, writes and listings; the server's name is found by a proxy."""
    config = tmp_path / "config"
    config.write_text(f"[default]\ns3 =\n  addressing_style = {style}\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    monkeypatch.setenv("HTTP_PROXY", odd.endpoint_url)
    monkeypatch.setenv("http_proxy", odd.endpoint_url)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://s3.test:9000")
    source = open_odd()
    assert read(source, BIG).data == odd.objects[BIG]
    assert {listed.name for listed in source.list()} == {SMALL, BIG}
    hosts = {headers["host"] for _, headers in odd.requests}
    assert hosts == {f"{BUCKET}.s3.test:9000" if style == "virtual" else "s3.test:9000"}


@pytest.fixture
def private(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[tuple[OddS3, str]]:
    """A server with a certificate of a CA of its own, and the path of that CA's certificate."""
    ca, context = trustme.CA(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ca.issue_cert("localhost").configure_cert(context)
    ca.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    for name in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
    with odd_s3(context) as server:
        lead_to(server, monkeypatch)
        yield server, str(tmp_path / "ca.pem")


@pytest.mark.slow
@pytest.mark.parametrize("by", ["AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE", "ca_bundle"])
def test_a_private_ca_is_trusted(
    private: tuple[OddS3, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, by: str
) -> None:
    """However boto3 or OpenSSL is told of it, both clients trust it: obstore's and boto3's own."""
    server, ca = private
    if by == "ca_bundle":
        (tmp_path / "config").write_text(f"[profile fleet]\nca_bundle = {ca}\n{KEYS_OF_PROFILE}")
        monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    else:
        monkeypatch.setenv(by, ca)
    source = open_odd(profile="fleet" if by == "ca_bundle" else None)
    assert read(source, SMALL).data == server.objects[SMALL]
    assert len(list(source.list())) == 2
    server.habits.ranges = False
    assert read(source, BIG).data == server.objects[BIG]


@pytest.mark.slow
def test_an_unknown_ca_is_named_and_what_to_do(
    private: tuple[OddS3, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Reads and listings say which CAs are trusted and by which variable; clients of ours do not see the path."""
    other = tmp_path / "other.pem"
    trustme.CA().cert_pem.write_to_path(str(other))
    advice = "set AWS_CA_BUNDLE, the profile's `ca_bundle` or SSL_CERT_FILE"
    for variable, trusted in ((None, "the system's CAs"), ("AWS_CA_BUNDLE", f"the CAs in {other} .AWS_CA_BUNDLE.")):
        if variable:
            monkeypatch.setenv(variable, str(other))
        source = open_odd(retries=0)
        for ask in (lambda: source.get(SMALL), lambda: list(source.list())):  # noqa: B023
            with pytest.raises(StoreUnavailable, match=rf"TLS handshake failed.*{trusted}; .*{advice}") as caught:
                ask()
            assert str(tmp_path) not in caught.value.public
    monkeypatch.setenv("AWS_CA_BUNDLE", str(tmp_path / "none.pem"))
    with pytest.raises(InvalidStoreUrl, match=r"AWS_CA_BUNDLE is .*none\.pem', which is no readable PEM file"):
        open_odd()

"""When certificates end, as read from their files, compared with what the library `cryptography` reads."""

import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import trustme
from cryptography import x509
from hypothesis import given
from hypothesis import strategies as st

from server.access.certificates import MAX_BYTES, find_end, read_first_end


def write_chain(path: Path, ends: list[datetime]) -> list[float]:
    """A file of certificates that end then. What `cryptography` says of them, as Unix times."""
    ca = trustme.CA()
    blobs = [ca.issue_cert("127.0.0.1", not_before=None, not_after=end).cert_chain_pems[0].bytes() for end in ends]
    path.write_bytes(b"# a comment\n".join(blobs))
    return [each.not_valid_after_utc.timestamp() for each in x509.load_pem_x509_certificates(path.read_bytes())]


def test_the_first_end_of_a_chain_counts(tmp_path: Path) -> None:
    """Also beyond 2050, from where on DER writes years with four digits."""
    path, now = tmp_path / "chain.pem", datetime.now(UTC)
    ends = write_chain(path, [now + timedelta(days=days) for days in (400, 90, 40_000)])
    assert read_first_end(path) == min(ends)
    ends = write_chain(path, [now + timedelta(days=40_000)])
    assert read_first_end(path) == ends[0]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"no certificate", "no certificate in PEM"),
        (b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", "cannot be read"),
        (bytes(MAX_BYTES + 1), "more than"),
    ],
)
def test_what_is_none_is_refused(tmp_path: Path, content: bytes, why: str) -> None:
    """With the file's name."""
    path = tmp_path / "server.pem"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"server\.pem.*{why}"):
        read_first_end(path)


DER = ssl.PEM_cert_to_DER_cert(trustme.CA().cert_pem.bytes().decode())


@given(at=st.integers(0, len(DER) - 1), value=st.integers(0, 255), cut=st.integers(0, len(DER)))
def test_damaged_certificates_end_in_errors_that_are_expected(at: int, value: int, cut: int) -> None:
    """A changed byte or a missing end gives a time or ValueError or IndexError, and nothing else."""
    damaged = bytes((*DER[:at], value, *DER[at + 1 :]))[:cut]
    try:
        assert isinstance(find_end(damaged), float)
    except (ValueError, IndexError):
        pass

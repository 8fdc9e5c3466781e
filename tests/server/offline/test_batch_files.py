"""The S3 client of `fleetcast batch`, for requests and answers beside the store."""

import ssl
from pathlib import Path

import pytest
import trustme

from server.cli.setting_flags import settings_from
from server.offline.batch_files import TransferFailed, _connect_s3
from tests.model_store.stores.test_s3_store import SMALL, lead_to
from tests.odd_s3 import BUCKET, odd_s3


@pytest.mark.slow
@pytest.mark.parametrize("variable", ["AWS_CA_BUNDLE", "SSL_CERT_FILE"])
def test_a_private_ca_is_trusted_as_by_the_store(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variable: str
) -> None:
    """boto3 alone does not know SSL_CERT_FILE nor the system's CAs; a file that is none is an error of one line."""
    ca, context = trustme.CA(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ca.issue_cert("localhost").configure_cert(context)
    ca.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    with odd_s3(context) as server:
        lead_to(server, monkeypatch)
        monkeypatch.delenv("REQUESTS_CA_BUNDLE", raising=False)
        monkeypatch.setenv(variable, str(tmp_path / "ca.pem"))
        settings = settings_from({"store": str(tmp_path)})
        with _connect_s3(settings, "fetching", lambda *_: lambda _: None) as (client, _):
            assert client.get_object(Bucket=BUCKET, Key=SMALL)["Body"].read() == server.objects[SMALL]
    monkeypatch.setenv(variable, str(tmp_path / "none.pem"))
    with pytest.raises(TransferFailed, match="no readable PEM file"), _connect_s3(settings, "f", lambda *_: print):
        pass

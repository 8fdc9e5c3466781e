"""What a request shows of its sender: a token, or a signature by an access key (AWS Signature Version 4).

Botocore signs; it is imported when a request is signed.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

SERVICE = "sagemaker"
REGION = "us-east-1"


@dataclass(frozen=True, slots=True)
class AccessKey:
    """One of a server's `access_keys`. `region` is part of what is signed; a server takes any."""

    key: str
    secret: str = field(repr=False)
    region: str = REGION
    session_token: str | None = field(default=None, repr=False)


def find_token() -> str | None:
    """The caller's own token: the variable FLEETCAST_TOKEN."""
    return os.environ.get("FLEETCAST_TOKEN") or None


def find_access_key() -> AccessKey | None:
    """The caller's own key by boto3's chain: variables, profiles, roles. None where there is none."""
    os.environ.setdefault("AWS_EC2_METADATA_DISABLED", "true")  # no server's key is an EC2 role's: do not ask for one
    import botocore.session  # noqa: PLC0415 -- a quarter of a second

    session = botocore.session.get_session()
    found = session.get_credentials()
    if found is None:
        return None
    frozen = found.get_frozen_credentials()
    region = session.get_config_variable("region") or REGION
    return AccessKey(frozen.access_key, frozen.secret_key, region, frozen.token)


def sign_request(key: AccessKey, method: str, url: str, headers: Mapping[str, str], body: bytes) -> dict[str, str]:
    """The headers of the request, and those that sign it and them."""
    from botocore.auth import SigV4Auth  # noqa: PLC0415
    from botocore.awsrequest import AWSRequest  # noqa: PLC0415
    from botocore.credentials import Credentials  # noqa: PLC0415

    request = AWSRequest(method, url, dict(headers), body)
    SigV4Auth(Credentials(key.key, key.secret, key.session_token), SERVICE, key.region).add_auth(request)
    return dict(request.headers.items())

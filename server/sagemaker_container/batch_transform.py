"""What SageMaker's batch transform is told about the requests that are worth sending. Pure."""

from collections.abc import Mapping
from typing import Any

from server.contract import MIB

MAX_PAYLOAD_MIB = 100  #: of batch transform, where 0 means as much as there is


def describe_transform(variables: Mapping[str, str], max_body_bytes: int, at_once: int) -> dict[str, Any]:
    """What `/execution-parameters` answers: how a batch transform should send its records.

    `at_once`: requests that are worth sending at the same time. Lines of JSON and CSV may share a request.
    """
    asked = variables.get("SAGEMAKER_MAX_CONCURRENT_TRANSFORMS", "")
    strategy = variables.get("SAGEMAKER_BATCH_STRATEGY", "").upper().replace("-", "_")
    return {
        "MaxConcurrentTransforms": int(asked) if asked.isdigit() and int(asked) else at_once,
        "BatchStrategy": strategy if strategy in ("SINGLE_RECORD", "MULTI_RECORD") else "MULTI_RECORD",
        "MaxPayloadInMB": max(1, min(MAX_PAYLOAD_MIB, max_body_bytes // MIB)),
    }

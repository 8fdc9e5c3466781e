"""What a batch transform is told."""

import pytest

from server.sagemaker_container.batch_transform import describe_transform


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, (64, "MULTI_RECORD", 6)),
        (
            {"SAGEMAKER_MAX_CONCURRENT_TRANSFORMS": "3", "SAGEMAKER_BATCH_STRATEGY": "SingleRecord"},
            (3, "MULTI_RECORD", 6),
        ),
        ({"SAGEMAKER_BATCH_STRATEGY": "single-record"}, (64, "SINGLE_RECORD", 6)),
        ({"SAGEMAKER_MAX_CONCURRENT_TRANSFORMS": "0"}, (64, "MULTI_RECORD", 6)),
    ],
)
def test_a_batch_transform_is_told_how_to_send(variables: dict[str, str], expected: tuple[int, str, int]) -> None:
    """What the job asks for is answered where it can be."""
    found = describe_transform(variables, 6 * 2**20, 64)
    assert found == dict(zip(("MaxConcurrentTransforms", "BatchStrategy", "MaxPayloadInMB"), expected, strict=True))

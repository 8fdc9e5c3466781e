"""The gRPC front's process."""

import subprocess
import sys

import pytest

HEAVY = ("torch", "numpy", "onnxruntime", "handlers", "boto3")


@pytest.mark.slow
def test_it_imports_nothing_that_computes() -> None:
    """Neither itself nor what grpcio and protobuf bring."""
    code = f"import sys, server.front.grpc.main; print([name for name in {HEAVY!r} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert found.stdout.strip() == "[]"

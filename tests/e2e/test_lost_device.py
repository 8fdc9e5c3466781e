"""A server on two simulated GPUs, and a request that ruins the CUDA context of the worker that runs it.

The simulated device is put into the workers by a `sitecustomize` on their PYTHONPATH. A device that is lost fails every
call, as a CUDA context does after an illegal access, until its process ends.
"""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from server.worker.engine.device_errors import EXIT_CODE
from tests.e2e.models import pack_fleet
from tests.e2e.server import ROOT, Load, run_server, upload
from tests.s3 import S3Server

pytestmark = pytest.mark.e2e

POISON = 666.0
FAULT = f"""
import sys
if "server.worker.main" in " ".join(sys.orig_argv):
    import torch
    from server.worker.engine import accelerator, device
    from tests.server.fake_device import FakeDevice

    torch.version.cuda = "13.0"

    class Mortal(FakeDevice):
        lost = False

        def check(self):
            if self.lost:
                raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered\\nCompile with")

        def advance(self):
            self.check()
            super().advance()

        def drain(self):
            self.check()
            super().drain()

        def _tell(self, *work):
            self.check()
            return super()._tell(*work)

    run = accelerator.DeviceEngine.run

    def run_or_die(self, family, offsets, inputs):
        parts = inputs if isinstance(inputs, list) else next(inputs.cut(1 << 20))
        self._device.lost |= any((part == {POISON}).any() for part in parts)
        return run(self, family, offsets, inputs)

    accelerator.DeviceEngine.run = run_or_die
    device.CudaDevice = lambda where, precision: Mortal(total_bytes=2**34)
"""


def test_a_lost_device_ends_its_worker_and_costs_no_other_request(s3: S3Server, store: str, tmp_path: Path) -> None:
    """Under load a request's forward makes the device fail for good. Its worker ends with a line that says why, and the
    request is asked elsewhere once: it ends that worker too, and its model is in quarantine. The requests of all other
    models are answered right, by the other worker or by the next ones.
    """
    culprit, *innocents = models = pack_fleet("lost", 6)
    upload(s3, store, models)
    (tmp_path / "sitecustomize.py").write_text(FAULT)
    shown = {"PYTHONPATH": f"{tmp_path}:{ROOT}", "CUDA_VISIBLE_DEVICES": "GPU-1,MIG-2"}
    sizes = {"model_cache_bytes": "16MiB", "host_cache_bytes": "1MiB"}
    features, context = culprit.shape
    poison = json.dumps({"x": [[POISON] * context] * features}).encode()
    questions = [model.question(1) for model in innocents]
    with (
        run_server(s3, tmp_path, f"s3://{store}", workers=None, environment=shown, device="auto", **sizes) as server,
        ThreadPoolExecutor(2) as pool,
    ):
        assert {row["device"] for row in server.processes("worker")} == {"cuda:GPU-1", "cuda:MIG-2"}
        for question in [*questions, culprit.question(0)]:
            server.ask(question)
        with Load(server, questions, clients=2) as load:
            load.more(10)
            answers = list(pool.map(lambda _: server.post(culprit.name, poison), range(2)))
            load.more(10)
        assert {outcome.problem for outcome in load.outcomes} == {""}
        assert {answer.status_code for answer in answers} == {424}
        assert all("quarantined" in answer.text for answer in answers)
        server.await_said('"ended"', 2)
        server.await_said('"device_lost"', 2)
        ends = [json.loads(line) for line in server.said().splitlines() if '"ended"' in line]
        assert [line["code"] for line in ends] == [EXIT_CODE] * 2

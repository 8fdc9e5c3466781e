"""A batch that goes on after a torn checkpoint ends with the bytes of one that was never interrupted."""

import json
import os
from codecs import BOM_UTF8
from io import BytesIO
from pathlib import Path

import pytest

from server.cli.setting_flags import settings_from
from server.offline import batch_files
from server.offline.batch_inference import CHUNK, index_lines
from server.offline.checkpoint import RECORD
from tests.e2e.models import Model, pack_forecaster

pytestmark = pytest.mark.slow

#: One row alone differs in the last bits from the same row among others.
GRU = {"features": 1, "context_length": 48, "prediction_length": 24, "quantiles": 3, "hidden": 64}
LINES = 3 * CHUNK + 10  #: of two models, in turns: a whole chunk and more of each
CUTS = (1, 7, CHUNK - 1, CHUNK, CHUNK + 13, 2 * CHUNK - 5, LINES - 1)  #: answers that a crash has left


def make_line(model: Model, seed: int) -> str:
    """A request."""
    (instance,) = json.loads(model.question(seed).body)["instances"]
    return json.dumps({"target_model": model.name, **instance}) + "\n"


def test_a_run_that_goes_on_ends_with_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torn at many places, within chunks too, and within an answer or a record."""
    monkeypatch.chdir(tmp_path)
    models = [pack_forecaster(f"m{i}.mar", i, "gru", GRU, forecast=True) for i in range(2)]
    store = tmp_path / "models"
    store.mkdir()
    for model in models:
        (store / model.name).write_bytes(model.data)
    Path("in.jsonl").write_text("".join(make_line(models[i % 2], i) for i in range(LINES)))
    settings = settings_from({"store": str(store)})

    def run(out: str) -> bytes:
        done, failed = batch_files.answer_file(settings, "in.jsonl", out, b"{}", lambda *_: lambda _: None)
        assert (done, failed) == (LINES, 0)
        return Path(out).read_bytes()

    whole = run("whole.jsonl")
    Path("torn").mkdir()  # a folder cannot be replaced: the checkpoint stays
    with pytest.raises(IsADirectoryError):
        run("torn")
    left = {suffix: Path(f"torn.{suffix}").read_bytes() for suffix in ("part", "index")}
    head = len(left["index"]) - LINES * RECORD.size
    for cut in CUTS:
        Path("out.jsonl.part").write_bytes(left["part"])
        Path("out.jsonl.index").write_bytes(left["index"][: head + cut * RECORD.size + 5])
        assert run("out.jsonl") == whole, f"after {cut} answers"
        Path("out.jsonl.part").write_bytes(left["part"])
        Path("out.jsonl.index").write_bytes(left["index"])
        os.truncate("out.jsonl.part", len(left["part"]) * cut // LINES)
        assert run("out.jsonl") == whole, f"after {cut} answers' bytes"


def test_a_byte_order_mark_is_no_part_of_the_first_line() -> None:
    """Files of spreadsheets and some editors begin with one; elsewhere it is no JSON."""
    line = b'{"target_model": "a.mar", "target": [1]}'
    plain, marked, twice = (
        index_lines(BytesIO(text), 100, lambda _: None)
        for text in (line + b"\n" + line, BOM_UTF8 + line + b"\n" + line, line + b"\n" + BOM_UTF8 + line)
    )
    assert marked.names == plain.names == ["a.mar"]
    assert (marked.model.tolist(), marked.size.tolist()) == (plain.model.tolist(), plain.size.tolist())
    assert marked.start.tolist() == [3, 3 + len(line) + 1]
    assert twice.model.tolist() == [0, -1]

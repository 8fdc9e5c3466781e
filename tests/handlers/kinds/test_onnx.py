"""The ONNX runner, against real models: batching, refusals, and no file ever read."""

import json
import os
import resource
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from handlers.codecs.codec import SingleCodec
from handlers.errors import Overran, RequestError, RunFailed, UnsupportedMedia
from handlers.kinds.onnx import OnnxModel
from handlers.kinds.onnx.scan import check_model
from handlers.work import SessionLimits
from model_store.errors import ArchiveInvalid, LoadError, UnsupportedKind


def make_onnx(
    nodes: list[onnx.NodeProto],
    x: tuple[str | int, ...],
    y: tuple[str | int, ...],
    tensors: tuple[TensorProto, ...] = (),
    kind: int = TensorProto.FLOAT,
) -> bytes:
    """A model of one input x and one output y."""
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", kind, x)],
        [helper.make_tensor_value_info("y", kind, y)],
        list(tensors),
    )
    return bytes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()
    )


def make_doubling(*x: str | int) -> bytes:
    """The model of y = x + x."""
    return make_onnx([helper.make_node("Add", ["x", "x"], ["y"])], x, x)


def make_counting() -> bytes:
    """The model of the length of a sequence of tensors."""
    graph = helper.make_graph(
        [helper.make_node("SequenceLength", ["x"], ["y"])],
        "g",
        [helper.make_tensor_sequence_value_info("x", TensorProto.FLOAT, None)],
        [helper.make_tensor_value_info("y", TensorProto.INT64, ())],
    )
    return bytes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()
    )


def make_external(location: str) -> TensorProto:
    """A tensor of two floats that lie in another file."""
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[2], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", "0"), ("length", "8")):
        tensor.external_data.add(key=key, value=value)
    return tensor


@pytest.mark.parametrize("x", [("n", 2, 3), (1, 2, 3)])
def test_runs_any_batch(x: tuple[str | int, ...]) -> None:
    """A dynamic batch axis runs at once, one fixed at 1 row by row; both give the same rows."""
    loaded = OnnxModel(make_doubling(*x))
    assert dict(loaded.inputs) == {"x": (2, 3)}
    assert list(loaded.outputs) == ["y"]
    rows = np.arange(24, dtype=np.float32).reshape(4, 2, 3)
    assert np.array_equal(loaded.run({"x": rows})["y"], 2 * rows)
    assert np.array_equal(loaded.run({"x": rows[:1]})["y"], 2 * rows[:1])


def test_a_request_through_the_codec() -> None:
    """The runner's own description is what the codec needs: JSON in, JSON out, an open dimension included."""
    loaded = OnnxModel(make_doubling("n", "length"))
    codec = SingleCodec(loaded.inputs, loaded.outputs)
    call = codec.decode(b'{"x": [1, 2, 3]}', "", "")
    assert call.encode(loaded.run(call.feeds))[0] == b'{"predictions":[2.0,4.0,6.0]}'


@pytest.mark.parametrize("location", ["/etc/hostname", "weights.bin", "../weights.bin"])
@pytest.mark.parametrize("place", ["initializer", "attribute", "subgraph", "sparse"])
def test_external_data_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, location: str) -> None:
    """A tensor in a file is refused wherever the format allows a tensor, also where the file exists."""
    (tmp_path / "weights.bin").write_bytes(bytes(8))
    monkeypatch.chdir(tmp_path)
    tensor = make_external(location)
    add = helper.make_node("Add", ["x", "w"], ["y"])
    shape = ("n", 2)
    constant = helper.make_node("Constant", [], ["w"], value=tensor)
    if place == "initializer":
        raw = make_onnx([add], shape, shape, (tensor,))
    elif place == "attribute":
        raw = make_onnx([constant, add], shape, shape)
    elif place == "subgraph":
        branch = helper.make_graph([constant], "b", [], [helper.make_tensor_value_info("w", 1, [2])])
        raw = make_onnx([helper.make_node("If", ["x"], ["y"], then_branch=branch, else_branch=branch)], shape, shape)
    else:
        parsed = onnx.load_from_string(make_onnx([add], shape, shape))
        parsed.graph.sparse_initializer.add().values.CopyFrom(tensor)
        raw = parsed.SerializeToString()
    with pytest.raises(ArchiveInvalid, match="external file"):
        OnnxModel(raw)


def test_tensors_inside_the_model_are_fine() -> None:
    """An initializer that says aloud that it is inside (location 0) is no external data."""
    tensor = helper.make_tensor("w", TensorProto.FLOAT, [2], [1, 2])
    tensor.data_location = TensorProto.DEFAULT
    loaded = OnnxModel(make_onnx([helper.make_node("Add", ["x", "w"], ["y"])], ("n", 2), ("n", 2), (tensor,)))
    assert loaded.run({"x": np.zeros((1, 2), np.float32)})["y"].tolist() == [[1, 2]]


@given(st.binary(max_size=300), st.integers(0, 100))
def test_broken_bytes_are_refused_cleanly(noise: bytes, keep: int) -> None:
    """Noise, and real models that end in noise, raise nothing but ArchiveInvalid before the runtime sees them."""
    for raw in (noise, make_doubling("n", 2)[:keep] + noise):
        try:
            check_model(raw)
        except ArchiveInvalid as error:
            assert str(error).startswith("model.onnx:")  # noqa: PT017 - either outcome is right


#: For each type that ONNX and the Open Inference Protocol both have: values of a row as JSON has them.
TYPES: dict[str, tuple[int, list[object]]] = {
    "BOOL": (TensorProto.BOOL, [True, False]),
    **{f"INT{n}": (getattr(TensorProto, f"INT{n}"), [-(1 << n - 1), 7]) for n in (8, 16, 32, 64)},
    **{f"UINT{n}": (getattr(TensorProto, f"UINT{n}"), [(1 << n) - 1, 0]) for n in (8, 16, 32, 64)},
    "FP16": (TensorProto.FLOAT16, [1.5, -2]),
    "BF16": (TensorProto.BFLOAT16, [1.5, -2]),
    "FP32": (TensorProto.FLOAT, [1.5, -2]),
    "FP64": (TensorProto.DOUBLE, [0.1, -1e300]),
    "BYTES": (TensorProto.STRING, ["a", "\u00e9"]),
}


@pytest.mark.parametrize("datatype", TYPES)
@pytest.mark.parametrize("batch", ["n", 1])
def test_every_type_of_tensor(datatype: str, batch: str | int) -> None:
    """Inputs and outputs keep their types, alone and together with other requests; JSON says values as they are."""
    kind, values = TYPES[datatype]
    loaded = OnnxModel(make_onnx([helper.make_node("Identity", ["x"], ["y"])], (batch, 2), (batch, 2), kind=kind))
    assert loaded.types == ({} if datatype == "FP32" else {"x": datatype, "y": datatype})
    codec = SingleCodec(loaded.inputs, loaded.outputs, loaded.types)
    wanted = [values, values[::-1], values]
    for _ in range(3):
        calls = [codec.decode(json.dumps({"x": each}).encode(), "", "") for each in wanted]
        answers = loaded.run_all([call.feeds for call in calls])
        for call, answer, expected in zip(calls, answers, wanted, strict=True):
            assert not isinstance(answer, RunFailed)
            assert json.loads(call.encode(answer)[0]) == {"predictions": expected}
    call = codec.decode(json.dumps({"x": values}).encode(), "", "")
    rows = {"x": np.concatenate([call.feeds["x"]] * 3)}
    assert loaded.run(rows)["y"].tolist() == rows["x"].tolist()


def test_typed_inputs_are_read_strictly() -> None:
    """An integer that wraps is refused with its place; npy is for float32 alone."""
    codec = SingleCodec({"x": (-1,)}, {"y": (-1,)}, {"x": "INT32", "y": "INT32"})
    with pytest.raises(RequestError, match="3000000000 is not within") as caught:
        codec.decode(b'{"x": [1, 3000000000]}', "", "")
    assert caught.value.field == "x[1]"
    with pytest.raises(RequestError, match="expected a whole number"):
        codec.decode(b'{"x": [1.5]}', "", "")
    with pytest.raises(RequestError, match="the input is missing"):
        codec.decode(b"{}", "", "")
    with pytest.raises(UnsupportedMedia, match=r"carries one FP32 array; the model takes x \(INT32\)"):
        codec.decode(b"", "application/x-npy", "")


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "cannot be loaded|at least one"),
        (b"not a model", "not an ONNX model"),
        (make_doubling("n", 2)[:-3], "not an ONNX model"),
        (make_onnx([helper.make_node("Nonsense", ["x"], ["y"])], ("n", 2), ("n", 2)), "cannot be loaded.*Nonsense"),
        (make_counting(), "seq.*served are"),
        (make_doubling(3, 2), r"\[3, 2\] needs a batch axis"),
        (make_doubling(), "needs a batch axis"),
    ],
)
def test_what_cannot_be_served_is_refused_at_load(raw: bytes, message: str) -> None:
    """Broken models and those without a batch axis are archive errors that say why."""
    with pytest.raises(ArchiveInvalid, match=message):
        OnnxModel(raw)


def test_a_failing_run_is_the_models_failure() -> None:
    """The runtime's own error, and an output that lost its batch axis, are RunFailed."""
    with pytest.raises(RunFailed, match="ONNX Runtime"):
        OnnxModel(make_doubling("n", 2)).run({"x": np.zeros((1, 3), np.float32)})
    total = make_onnx([helper.make_node("ReduceSum", ["x"], ["y"], keepdims=0)], ("n", 2), ())
    with pytest.raises(RunFailed, match=r"shape \[\], but 1 rows"):
        OnnxModel(total).run({"x": np.zeros((1, 2), np.float32)})


def count_runs(loaded: OnnxModel, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of each run of the session from now on."""
    rows: list[int] = []
    run = loaded._run

    def note(feeds: dict[str, npt.NDArray[np.float32]], count: int) -> dict[str, npt.NDArray[np.float32]]:
        rows.append(int(count))
        return run(feeds, count)

    monkeypatch.setattr(loaded, "_run", note)
    return rows


def draw_requests(*seeds: int, rows: int = 1) -> list[dict[str, npt.NDArray[np.float32]]]:
    """A request of random numbers for each seed."""
    return [{"x": np.random.default_rng(seed).normal(size=(rows, 3)).astype(np.float32)} for seed in seeds]


def test_requests_run_together_once_that_is_proved(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first that differ are run both ways; from then on one run serves all, each getting its own rows."""
    loaded = OnnxModel(make_doubling("n", 3))
    runs = count_runs(loaded, monkeypatch)
    loaded.run_all(draw_requests(1, 1))  # equal requests prove nothing
    loaded.run_all(draw_requests(1, 2))
    assert runs == [2, 1, 1, 2, 1, 1]
    asked = [*draw_requests(3, 4, rows=2), *draw_requests(5)]
    answers = loaded.run_all(asked)
    assert runs[6:] == [5]
    for feeds, answer in zip(asked, answers, strict=True):
        assert isinstance(answer, dict)
        np.testing.assert_array_equal(answer["y"], 2 * feeds["x"])


def test_a_graph_that_mixes_rows_is_not_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    """A softmax along the batch axis would let one client's request change another's answer: each runs alone."""
    loaded = OnnxModel(make_onnx([helper.make_node("Softmax", ["x"], ["y"], axis=0)], ("n", 3), ("n", 3)))
    runs = count_runs(loaded, monkeypatch)
    for seeds in ((1, 2, 3), (4, 5)):
        for answer in loaded.run_all(draw_requests(*seeds)):
            assert isinstance(answer, dict)
            assert answer["y"].tolist() == [[1.0, 1.0, 1.0]]
    assert runs == [3, 1, 1, 1, 1, 1]


def test_one_bad_request_costs_the_others_nothing() -> None:
    """Where the common run fails each is run alone, and only the bad one fails; so do open axes of other lengths."""
    nodes = [helper.make_node("Reshape", ["x", "shape"], ["y"])]
    shape = helper.make_tensor("shape", TensorProto.INT64, [2], [-1, 4])
    loaded = OnnxModel(make_onnx(nodes, ("n", "m"), ("n", 4), (shape,)))
    good, bad = np.zeros((2, 4), np.float32), np.ones((1, 3), np.float32)
    found = loaded.run_all([{"x": good}, {"x": bad}, {"x": good}])
    assert [isinstance(each, RunFailed) for each in found] == [False, True, False]
    found = loaded.run_all([{"x": bad}, {"x": 2 * bad}])
    assert [isinstance(each, RunFailed) for each in found] == [True, True]


def test_without_cuda_the_error_names_the_extra() -> None:
    """Where this process has no CUDA, whatever build of the runtime it has, the error says what to install."""
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device: tests/gpu has sessions on it")
    with pytest.raises(UnsupportedKind, match=r"fleetcast\[cuda\]"):
        OnnxModel(make_doubling("n", 2), provider="cuda")
    assert issubclass(UnsupportedKind, LoadError)


def test_charge_covers_the_session() -> None:
    """Private memory of 20 more sessions stays within what they are charged."""
    weights = np.zeros((256, 256), np.float32)
    tensor = helper.make_tensor("w", TensorProto.FLOAT, weights.shape, weights.tobytes(), raw=True)
    raw = make_onnx([helper.make_node("MatMul", ["x", "w"], ["y"])], ("n", 256), ("n", 256), (tensor,))
    x = np.zeros((1, 256), np.float32)
    warm = [OnnxModel(raw) for _ in range(3)]
    for each in warm:
        each.run({"x": x})
    before = private_bytes()
    more = [OnnxModel(raw) for _ in range(20)]
    for each in more:
        each.run({"x": x})
    assert private_bytes() - before <= sum(each.charge_bytes for each in more)


def private_bytes() -> int:
    """Memory that only this process has."""
    path = Path("/proc/self/smaps_rollup")
    if not path.exists():
        pytest.skip(f"{os.name} does not tell private memory")
    return sum(int(line.split()[1]) * 1024 for line in path.read_text().splitlines() if line.startswith("Private_"))


def make_looping(operator: str = "Loop", trips: int = 2**62) -> bytes:
    """A model of a few hundred bytes that adds for as long as `trips` says, its loop inside a branch of an If."""
    info = helper.make_tensor_value_info
    body = helper.make_graph(
        [helper.make_node("Identity", ["c"], ["going"]), helper.make_node("Add", ["v", "v"], ["w"])],
        "body",
        [info("i", TensorProto.INT64, []), info("c", TensorProto.BOOL, []), info("v", TensorProto.FLOAT, None)],
        [info("going", TensorProto.BOOL, []), info("w", TensorProto.FLOAT, None)],
    )
    loop = helper.make_node(operator, ["trips", "yes", "x"], ["z"], body=body)
    branch = helper.make_graph([loop], "branch", [], [info("z", TensorProto.FLOAT, None)])
    tensors = (
        helper.make_tensor("trips", TensorProto.INT64, [], [trips]),
        helper.make_tensor("yes", TensorProto.BOOL, [], [True]),
    )
    choice = helper.make_node("If", ["yes"], ["y"], then_branch=branch, else_branch=branch)
    return make_onnx([choice], ("n", 2), ("n", 2), tensors)


@pytest.mark.parametrize("operator", ["Loop", "Scan", "SequenceMap"])
def test_a_loop_is_refused_wherever_it_is(operator: str) -> None:
    """A loop in a branch of an If is found, and the message says what to do; If alone is no loop."""
    with pytest.raises(ArchiveInvalid, match=f"operator {operator}.*onnx_control_flow"):
        OnnxModel(make_looping(operator))


def test_a_run_is_ended_at_its_limit() -> None:
    """Where loops are allowed, an endless one fails as the model's, of several requests the rest is not run, and a loop
    of a few rounds answers.
    """
    allowed = SessionLimits(forward_s=0.1, loops=True)
    endless = OnnxModel(make_looping(), limits=allowed)
    x = {"x": np.ones((1, 2), np.float32)}
    with pytest.raises(Overran, match=r"after 0\.1 s.*max_forward_s"):
        endless.run(x)
    with pytest.raises(Overran):
        endless.run_all([x, {"x": np.zeros((1, 2), np.float32)}])
    short = OnnxModel(make_looping(trips=3), limits=SessionLimits(forward_s=60.0, loops=True))
    assert short.run(x)["y"].tolist() == [[8.0, 8.0]]


def large_constant(numbers: int) -> bytes:
    """A model of some 150 bytes that adds the largest of so many zeros, which folding would make at load."""
    nodes = [
        helper.make_node("ConstantOfShape", ["shape"], ["zeros"]),
        helper.make_node("ReduceMax", ["zeros"], ["zero"], keepdims=0),
        helper.make_node("Add", ["x", "zero"], ["y"]),
    ]
    shape = helper.make_tensor("shape", TensorProto.INT64, [1], [numbers])
    return make_onnx(nodes, ("n", 2), ("n", 2), (shape,))


def test_a_small_file_takes_no_memory_at_load_and_is_bounded_when_it_runs() -> None:
    """2 GB of constants are not made at load; a run that wants them fails; one within the limit answers."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    huge = OnnxModel(large_constant(1 << 29))
    x = {"x": np.ones((1, 2), np.float32)}
    with pytest.raises(RunFailed, match="ONNX Runtime"):
        huge.run(x)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 512 * 1024  # KiB
    assert OnnxModel(large_constant(1 << 20)).run(x)["y"].tolist() == [[1.0, 1.0]]


@pytest.mark.parametrize(("numbers", "refused"), [(1 << 24, False), (1 << 28, True)])
def test_a_sparse_tensor_that_becomes_large_is_refused(numbers: int, refused: bool) -> None:
    """ONNX Runtime makes sparse tensors dense at load: 148 bytes took 1 GB."""
    parsed = onnx.load_from_string(make_onnx([helper.make_node("Add", ["x", "x"], ["y"])], ("n", 2), ("n", 2)))
    values = helper.make_tensor("w", TensorProto.FLOAT, [1], [1.0])
    place = helper.make_tensor("", TensorProto.INT64, [1], [0])
    parsed.graph.sparse_initializer.append(helper.make_sparse_tensor(values, place, [numbers // 4, 4]))
    if refused:
        with pytest.raises(ArchiveInvalid, match=r"sparse tensor of \d+ numbers.*16777216 are allowed"):
            check_model(parsed.SerializeToString())
    else:
        check_model(parsed.SerializeToString())


def test_a_model_leaves_no_file_open_and_no_path_in_messages() -> None:
    """It is read from a file in memory, while which the interpreter's lock is free; the file goes with the load."""
    sound, unsound = (
        make_onnx([helper.make_node(kind, ["x"], ["y"])], ("n", 2), ("n", 2)) for kind in ("Relu", "Nonsense")
    )
    OnnxModel(sound)  # the first one of a process has ONNX Runtime open what it keeps
    before = count_descriptors()
    loaded = OnnxModel(sound)
    with pytest.raises(ArchiveInvalid) as caught:
        OnnxModel(unsound)
    assert "/proc/" not in str(caught.value)
    assert count_descriptors() <= before, "what other tests have left may close meanwhile"
    assert loaded.run({"x": np.array([[-1.0, 2.0]], np.float32)})["y"].tolist() == [[0.0, 2.0]]


def count_descriptors() -> int:
    """Files that this process has open."""
    return len(list(Path("/proc/self/fd").iterdir()))

"""The operators a graph may hold, and what each needs besides its name.

Every one is a pure function of its arguments whose result's shape follows from their shapes: no randomness, no files,
no writing into an argument, no sizes that depend on numbers. `as_strided` is not here, since it reaches beyond its
argument into whatever lies beside it in memory: in a bank, other models. And where a kernel trusts its caller to have
compared shapes (`native_batch_norm`), the function in front of it runs instead.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from handlers.kinds.graph.schema import Arg, Named
from model_store.errors import ArchiveInvalid

GETITEM = "getitem"  #: takes one of several results apart; the only operator that is not ATen's
MAX_PIECES = 4096  #: tensors that one split may give

_DEFAULT = """
abs acos acosh adaptive_avg_pool1d adaptive_avg_pool2d addmm alias amax amin arange argmax argmin asin asinh atan
atan2 atanh avg_pool1d avg_pool2d baddbmm bitwise_not bmm cat ceil chunk clamp clone constant_pad_nd conv1d conv2d
conv3d conv_transpose1d convolution cos cosh cumprod cumsum detach diagonal elu embedding erf erfc exp exp2 expand
expm1 flip floor floor_divide full full_like gather gelu group_norm hardsigmoid hardswish hardtanh index_select isinf
isnan layer_norm leaky_relu lift_fresh_copy linalg_vector_norm linear log log10 log1p log2 log_sigmoid logaddexp
logical_and logical_not logical_or logical_xor logsumexp matmul max_pool1d max_pool2d maximum mean minimum mish mm
narrow neg ones ones_like pad permute pixel_shuffle prelu prod reciprocal reflection_pad1d reflection_pad2d relu relu6
repeat replication_pad1d replication_pad2d reshape rms_norm roll round rsqrt scalar_tensor
scaled_dot_product_attention select_scatter sgn sigmoid sign silu sin sinh slice_scatter softplus sort
split_with_sizes sqrt square stack sum t tan tanh topk tril triu trunc unfold unsqueeze view zeros zeros_like _to_copy
"""
_OVERLOADS = """
add.Scalar add.Tensor all.dim any.dim any.dims arange.start arange.start_step bitwise_and.Tensor bitwise_or.Tensor
bitwise_xor.Tensor clamp.Tensor conv1d.padding conv2d.padding conv_transpose2d.input div.Scalar div.Tensor
div.Tensor_mode eq.Scalar eq.Tensor flatten.using_ints floor_divide.Scalar fmod.Scalar fmod.Tensor ge.Scalar ge.Tensor
gru.input gt.Scalar gt.Tensor index.Tensor le.Scalar le.Tensor log_softmax.int lstm.input lt.Scalar lt.Tensor
masked_fill.Scalar max.dim mean.dim min.dim mul.Scalar mul.Tensor _native_batch_norm_legit.no_stats
_native_batch_norm_legit_no_training.default ne.Scalar ne.Tensor pow.Scalar pow.Tensor_Scalar pow.Tensor_Tensor
prod.dim_int remainder.Scalar remainder.Tensor rnn_relu.input rnn_tanh.input rsub.Scalar select.int slice.Tensor
softmax.int split.Tensor squeeze.dim squeeze.dims sub.Scalar sub.Tensor sum.dim_IntList transpose.int unbind.int
unflatten.int var.correction var_mean.correction where.ScalarOther where.ScalarSelf where.self
"""
ALLOWED = frozenset(
    [f"aten.{name}.default" for name in _DEFAULT.split()] + [f"aten.{name}" for name in _OVERLOADS.split()]
)

#: They make tensors of nothing, and take the device they make them on.
_FACTORIES = (
    "arange.default arange.start arange.start_step full.default ones.default scalar_tensor.default zeros.default"
)
FACTORIES = frozenset(f"aten.{name}" for name in _FACTORIES.split())

#: Which argument says where to look. It must be constant: an index that depends on a request may lie outside, and on a
#: GPU that ends the process.
INDEX_ARGUMENTS: Mapping[str, int] = {
    "aten.embedding.default": 1,
    "aten.gather.default": 2,
    "aten.index.Tensor": 1,
    "aten.index_select.default": 2,
}

#: Where to put a result is not the graph's to say; packing leaves these out.
PLACEMENT = frozenset({"device", "layout", "memory_format", "non_blocking", "pin_memory"})

#: Recurrences, and the gates of each.
_GATES: Mapping[str, int] = {
    "aten.gru.input": 3,
    "aten.lstm.input": 4,
    "aten.rnn_relu.input": 1,
    "aten.rnn_tanh.input": 1,
}

#: Argument and the only value it may have: with another the operator draws random numbers.
_FIXED: Mapping[str, tuple[str, object]] = {
    "aten.scaled_dot_product_attention.default": ("dropout_p", 0.0),
    **dict.fromkeys(_GATES, ("train", False)),
}

#: How many tensors a split gives.
_PIECES: Mapping[str, Callable[..., int]] = {
    "aten.chunk.default": lambda x, chunks, dim=0: min(chunks, x.shape[dim]),
    "aten.split.Tensor": lambda x, size, dim=0: -(-x.shape[dim] // size),
    "aten.unbind.int": lambda x, dim=0: x.shape[dim],
}


#: They divide, and of whole numbers do so in the processor, which ends the process where the result has no place: the
#: smallest number by -1. (torch 2.9; with 2.13 one of them still does.)
_DIVISIONS = frozenset(
    [
        "aten.div.Tensor_mode",
        "aten.floor_divide.Scalar",
        "aten.floor_divide.default",
        "aten.fmod.Scalar",
        "aten.fmod.Tensor",
        "aten.remainder.Scalar",
        "aten.remainder.Tensor",
    ]
)


_MULTIPLYING = """
addmm.default baddbmm.default bmm.default conv1d.default conv1d.padding conv2d.default conv2d.padding conv3d.default
conv_transpose1d.default conv_transpose2d.input convolution.default gru.input linear.default lstm.input matmul.default
mm.default rnn_relu.input rnn_tanh.input scaled_dot_product_attention.default
"""
_NORMALISING = """
_native_batch_norm_legit.no_stats _native_batch_norm_legit_no_training.default group_norm.default layer_norm.default
prelu.default rms_norm.default select_scatter.default slice_scatter.default
"""
#: They multiply numbers by weights, and do so in the weights' precision.
_PRODUCTS = frozenset(f"aten.{name}" for name in _MULTIPLYING.split())
#: Their kernels want one precision for all arguments too, but products they are not.
_OF_ONE_PRECISION = frozenset(f"aten.{name}" for name in _NORMALISING.split())


def choose_precision(op: str, short: torch.dtype) -> torch.dtype | None:
    """In what precision the operator's tensors meet where weights are `short` and inputs float32.

    None where torch itself brings them together, in float32.
    """
    if op in _PRODUCTS:
        return short
    return torch.float32 if op in _OF_ONE_PRECISION else None


def check_arguments(op: str, args: Sequence[Arg], kwargs: Mapping[str, Arg]) -> None:
    """What may be said before anything is computed, of an operator by name. Raises ArchiveInvalid."""
    if op == GETITEM:
        return
    if op not in ALLOWED:
        raise ArchiveInvalid(
            f"the operator {op!r} is not one a graph may hold (pure, of fixed shapes, of torch itself); "
            "write this part of the module with plain layers and functions of torch, or pack it as ONNX"
        )
    names = [argument.name for argument in _find_overload(op)._schema.arguments]  # noqa: SLF001 -- its names are nowhere else
    given = {**dict(zip(names, args, strict=False)), **kwargs}  # too many are refused by torch, in better words
    if unknown := PLACEMENT & given.keys():
        raise ArchiveInvalid(f"it may not say {', '.join(sorted(unknown))}: the server decides where numbers lie")
    dtype = given.get("dtype")
    if dtype is not None and not (isinstance(dtype, Named) and dtype.kind == "dtype"):
        raise ArchiveInvalid(f"dtype is {dtype!r}, not a named dtype")  # torch takes a wrong number for one, and dies
    name, only = _FIXED.get(op, ("", None))
    if given.get(name, only) != only:
        raise ArchiveInvalid(f"it has {name} {given[name]!r}, but a served model is in evaluation mode: must be {only}")


def check_tensors(op: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """What torch itself would not survive, of an operator's arguments. Raises ValueError, or what wrong ones raise."""
    if op in _PIECES and (pieces := _PIECES[op](*args, **kwargs)) > MAX_PIECES:
        raise ValueError(f"it would give {pieces} tensors, more than {MAX_PIECES}")
    if op in _GATES:
        _check_recurrence(_GATES[op], *args, **kwargs)
    if op in _DIVISIONS:
        _check_division(*args, **kwargs)
    if op == "aten.roll.default" and args[0].dim() == 0:  # under `vmap` torch would roll the models instead
        raise ValueError("it rolls a tensor of no axes")
    if (
        op == "aten.pixel_shuffle.default" and args[1] ** 2 > args[0].numel()
    ):  # torch 2.9 divides by its square's low bits
        raise ValueError(f"its factor {args[1]} is too large for {list(args[0].shape)}")


def _check_division(x: Any, by: Any, *, rounding_mode: str | None = None) -> None:  # noqa: ARG001 -- the operators' own
    """Whole numbers are divided by a number, where one can see that it is not -1."""
    floats = [
        each.is_floating_point() if isinstance(each, torch.Tensor) else isinstance(each, float) for each in (x, by)
    ]
    if not any(floats) and (isinstance(by, torch.Tensor) or by == -1):
        raise ValueError("it divides whole numbers by a tensor, or by -1: convert them with .float() before")


def _check_recurrence(
    gates: int,
    x: torch.Tensor,
    hx: torch.Tensor | Sequence[torch.Tensor],
    params: Sequence[torch.Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,  # noqa: ARG001 -- the operator's own signature
    train: bool,  # noqa: ARG001
    bidirectional: bool,
    batch_first: bool,
) -> None:
    """Shapes of `nn.GRU`, `nn.LSTM`, `nn.RNN`: the kernels trust the layers' own checks, which a graph has not seen."""
    states = [hx] if isinstance(hx, torch.Tensor) else hx
    directions, hidden, batch = 1 + bidirectional, states[0].shape[-1], x.shape[0 if batch_first else 1]
    if x.dim() != 3 or any(state.shape != (num_layers * directions, batch, hidden) for state in states):  # noqa: PLR2004
        raise ValueError(f"states {[list(state.shape) for state in states]} do not fit the input {list(x.shape)}")
    if len(params) != num_layers * directions * (4 if has_biases else 2):
        raise ValueError(f"{len(params)} parameters are not those of {num_layers} layers")
    wanted: list[tuple[int, ...]] = []
    for width in [x.shape[2], *[hidden * directions] * (num_layers - 1)]:
        wanted += [
            (gates * hidden, width),
            (gates * hidden, hidden),
            *[(gates * hidden,)] * 2 * has_biases,
        ] * directions
    if wanted != (found := [tuple(param.shape) for param in params]):
        raise ValueError(f"its numbers are {found}, but the states and the input need {wanted}")


def find_operator(op: str) -> Callable[..., Any]:
    """What runs one model's operator. Raises ArchiveInvalid where this torch does not have it."""
    found: Callable[..., Any] = _SAME[op] if op in _SAME else _find_overload(op)
    return found


def _find_overload(op: str) -> Any:
    _, name, overload = op.split(".")
    try:
        return getattr(getattr(torch.ops.aten, name), overload)
    except AttributeError as error:
        raise ArchiveInvalid(f"torch {torch.__version__} has no operator {op!r}; pack the archive again") from error


def find_batched_operator(op: str) -> Callable[..., Any]:
    """What runs the operator under `vmap`: the same, or what gives the same answers where `vmap` has no rule."""
    return _plain_attention if op == "aten.scaled_dot_product_attention.default" else find_operator(op)


def _batched_getitem(several: Sequence[torch.Tensor], index: int) -> torch.Tensor:
    if not isinstance(several, tuple | list):
        raise TypeError("getitem takes one of several results, not a part of a tensor")
    found: torch.Tensor = several[index]
    return found


def _batch_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor,
    var: torch.Tensor,
    momentum: float,
    eps: float,
) -> tuple[torch.Tensor]:
    return (torch.batch_norm(x, weight, bias, mean, var, False, momentum, eps, False),)


def _own_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[torch.Tensor]:
    return (torch.batch_norm(x, weight, bias, None, None, training, momentum, eps, False),)


def _plain_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """`scaled_dot_product_attention` as its documentation defines it; a query that may see nothing gets zeros."""
    assert dropout_p == 0.0, "checked with the graph"
    if enable_gqa:  # several heads of queries look at one of keys
        key, value = (each.repeat_interleave(query.shape[-3] // each.shape[-3], -3) for each in (key, value))
    scores = torch.matmul(query * (query.shape[-1] ** -0.5 if scale is None else scale), key.transpose(-2, -1))
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is None:
        return torch.matmul(torch.softmax(scores, -1), value)
    scores = torch.where(attn_mask, scores, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    blind = (scores == -torch.inf).all(-1, keepdim=True)
    return torch.matmul(torch.where(blind, 0.0, torch.softmax(scores, -1)), value)


_SAME: Mapping[str, Callable[..., Any]] = {
    GETITEM: _batched_getitem,
    # Strides under `vmap` are others than alone, so a view of them may have to be a copy.
    "aten.view.default": torch.ops.aten.reshape.default,
    "aten._native_batch_norm_legit_no_training.default": _batch_norm,
    "aten._native_batch_norm_legit.no_stats": _own_norm,
    "aten.lift_fresh_copy.default": torch.ops.aten.clone.default,
}

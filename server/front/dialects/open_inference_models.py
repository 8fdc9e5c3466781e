"""What the Open Inference Protocol says of models beyond their tensors: configuration, statistics, the index.

Pure: a worker's description and the models that workers know become JSON values, with the fields that Triton 2.51 has.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from server.ipc.operations import KnownModel, ModelUsage

VERSION = "1"  #: of every model; what is served is said by X-Fleetcast-Model-Version
PLATFORM = "fleetcast"
MOST_ROWS = 1024  #: of one request, as `handlers.codecs.open_inference_requests` has it
MOST_LISTED = 1000  #: models of an index, or of all statistics
STATES = {"ready": "READY", "loading": "LOADING", "unloading": "UNLOADING"}

Tensors = Sequence[Mapping[str, Any]]


def make_config(model: str, inputs: Tensors, outputs: Tensors) -> dict[str, Any]:
    """A model's configuration. What Triton's operators choose, and this server does not have, is as by default."""
    own = {"is_shape_tensor": False, "is_non_linear_format_io": False}
    sent = {"format": "FORMAT_NONE", "allow_ragged_batch": False, "optional": False}
    group = {"name": model, "kind": "KIND_AUTO", "count": 1, "gpus": [], "secondary_devices": [], "profile": []}
    return {
        "name": model,
        "platform": PLATFORM,
        "backend": PLATFORM,
        "runtime": "",
        "version_policy": {"latest": {"num_versions": 1}},
        "max_batch_size": MOST_ROWS,
        "input": [{**_make_tensor(each), **sent, **own} for each in inputs],
        "output": [{**_make_tensor(each), "label_filename": "", **own} for each in outputs],
        "batch_input": [],
        "batch_output": [],
        "optimization": {
            "priority": "PRIORITY_DEFAULT",
            "input_pinned_memory": {"enable": True},
            "output_pinned_memory": {"enable": True},
            "gather_kernel_buffer_threshold": 0,
            "eager_batching": False,
        },
        "instance_group": [{**group, "passive": False, "host_policy": ""}],
        "default_model_filename": "",
        "cc_model_filenames": {},
        "metric_tags": {},
        "parameters": {},
        "model_warmup": [],
    }


def make_statistics(models: Iterable[KnownModel]) -> dict[str, Any]:
    """The statistics of models since each was loaded, as all its workers have counted. One that is not has none."""
    return {"model_stats": [_make_stats(each.model, each.usage) for each in models if each.state != "unavailable"]}


def make_index(models: Iterable[KnownModel], *, only_ready: bool) -> list[dict[str, str]]:
    """The models that workers know. One that is not listed may be in the store: a request for it loads it."""
    return [
        {
            "name": each.model,
            "version": VERSION,
            "state": STATES.get(each.state, "UNAVAILABLE"),
            **({"reason": each.reason} if each.reason else {}),
        }
        for each in models
        if each.state == "ready" or not only_ready
    ]


def _make_tensor(tensor: Mapping[str, Any]) -> dict[str, Any]:
    """Name, type and dimensions without the axis of rows."""
    datatype = {"BYTES": "STRING"}.get(tensor["datatype"], tensor["datatype"])
    return {"name": tensor["name"], "data_type": f"TYPE_{datatype}", "dims": tensor["shape"][1:]}


def _make_stats(model: str, usage: ModelUsage) -> dict[str, Any]:
    counted = {
        "success": (usage.answers, usage.answered_us),
        "fail": (usage.failures, usage.failed_us),
        "queue": (usage.answers, usage.queued_us),
        "compute_input": (usage.answers, 0),
        "compute_infer": (usage.answers, usage.ran_us),
        "compute_output": (usage.answers, 0),
        "cache_hit": (0, 0),
        "cache_miss": (0, 0),
    }
    return {
        "name": model,
        "version": VERSION,
        "last_inference": usage.last_ms,
        "inference_count": usage.answers,
        "execution_count": usage.batches,
        "inference_stats": {name: {"count": count, "ns": us * 1000} for name, (count, us) in counted.items()},
        "response_stats": {},
        "batch_stats": [],
        "memory_usage": [],
    }

"""Reads the settings that `model-config.yaml` has for a server, without a library for YAML. Pure.

They are `key: value` lines at the file's top; all else in it is the handler's own.
"""

import re
from collections.abc import Mapping

from model_store.archives.archive import Archive
from model_store.errors import LoadError

CONFIG_FILE = "model-config.yaml"
MAX_BYTES = 64 * 1024

#: Key -> whether this server keeps it.
KEYS: Mapping[str, bool] = {
    "batchSize": True, "maxBatchDelay": True, "minWorkers": False, "maxWorkers": False, "responseTimeout": False,
    "startupTimeout": False, "deviceType": False, "deviceIds": False, "parallelType": False, "parallelLevel": False,
    "torchrun": False, "jobQueueSize": False, "useJobTicket": False, "clientTimeoutInMills": False,
    "maxRetryTimeoutInSec": False, "sequenceBatching": False, "continuousBatching": False, "asyncCommunication": False,
    "useVenv": False, "service_envelope": True,
}  # fmt: skip
_LINE = re.compile(r"([A-Za-z_]+)[ \t]*:[ \t]*([^#\r\n]*)", re.ASCII)


def read_batch_settings(archive: Archive) -> dict[str, str]:
    """Key -> value, as text, of those in KEYS; empty where the archive has no such file, or one that is damaged."""
    try:
        raw = bytes(archive.read(CONFIG_FILE)[:MAX_BYTES]) if CONFIG_FILE in archive.container.members else b""
    except LoadError:
        return {}
    lines = map(_LINE.match, raw.decode(errors="replace").splitlines())
    return {line[1]: line[2].strip().strip("\"'") for line in lines if line and line[1] in KEYS}


def explain_batches(settings: Mapping[str, str]) -> str:
    """How requests of the model are batched, in words; and which of the keys are not kept here."""
    size = settings.get("batchSize", "1")
    delay = settings.get("maxBatchDelay", "100")
    text = f"up to {size} requests in one call, the first waits at most {delay} ms" if size != "1" else "one by one"
    if envelope := settings.get("service_envelope"):
        text += f"; their bodies are taken apart by TorchServe's envelope {envelope}"
    others = [key for key in settings if not KEYS[key]]
    return f"{text}; not kept here: {', '.join(others)}" if others else text

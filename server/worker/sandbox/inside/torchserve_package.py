"""The package `ts` (the wheel `torchserve`), where it is installed: imported once in the template, fit for each child.

Its `base_handler` takes what it finds beside it: ONNX Runtime, which starts a thread, and CUDA, which no process may
have touched before it is forked. In the template it finds neither. A child whose archive has an ONNX file imports it
anew, and then finds ONNX Runtime.
"""

import importlib
import importlib.util
import logging
import sys
from pathlib import Path
from typing import Any, cast

PACKAGE, BASE = "ts", "ts.torch_handler.base_handler"
#: Also imported by `base_handler` where they are installed: they start threads or touch devices.
NEVER_BEFORE_A_FORK = ("openvino", "torch_tensorrt", "torch_xla", "intel_extension_for_pytorch")
ONNX = "onnxruntime"


def preload() -> None:
    """Import `ts` in the template, if it is installed. It is left out where it could not be imported alone."""
    if importlib.util.find_spec(PACKAGE) is None or any(map(importlib.util.find_spec, NEVER_BEFORE_A_FORK)):
        return
    torch: Any = sys.modules["torch"]
    asks_cuda, torch.cuda.is_available = torch.cuda.is_available, lambda: False
    sys.modules[ONNX] = cast("Any", None)  # as `import` knows a module that must not be found
    logging.disable()  # it warns of all that it has not found
    try:
        importlib.import_module(BASE)
    except Exception:  # a package of this name that is another one
        _forget()
    finally:
        logging.disable(logging.NOTSET)
        del sys.modules[ONNX]
        torch.cuda.is_available = asks_cuda


def fit(model_dir: Path, threads: int, *, has_device: bool) -> None:
    """Make the preloaded package what it would be for this archive, in its child."""
    if BASE not in sys.modules:
        return
    if next(model_dir.rglob("*.onnx"), None) is not None:
        _forget()
        _bound_threads(threads)
    elif has_device:
        _forget()  # it sets what the device can do when it is imported


def _forget() -> None:
    for name in [name for name in sys.modules if name == PACKAGE or name.startswith(f"{PACKAGE}.")]:
        del sys.modules[name]


def _bound_threads(threads: int) -> None:
    """Have `base_handler` give a session as many threads as its worker has: it asks psutil for the host's cores."""
    try:
        psutil: Any = importlib.import_module("psutil")
    except ImportError:
        return  # then it takes no ONNX file at all
    psutil.cpu_count = lambda **_: threads

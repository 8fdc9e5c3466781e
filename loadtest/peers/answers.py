"""Reads the numbers of a response, in whichever of the protocols' forms it is. Pure."""

import io
import json

import numpy as np
import numpy.typing as npt


def decode_answer(data: bytes, json_bytes: str | None = None) -> npt.NDArray[np.float64]:
    """Return the numbers of a response, flat: of npy, of JSON, or of the first of its binary tensors of FP32.

    `json_bytes`: the length of the document before binary tensors, as the response's header says it; None without one.
    Raises ValueError or LookupError for a response in another form.
    """
    if data.startswith(b"\x93NUMPY"):
        found: npt.NDArray[np.float64] = np.load(io.BytesIO(data), allow_pickle=False).astype(np.float64).ravel()
        return found
    at = len(data) if json_bytes is None else int(json_bytes)
    answer = json.loads(data[:at])
    if "outputs" not in answer:
        return np.asarray(answer["predictions"], np.float64).ravel()
    first = answer["outputs"][0]
    size = first.get("parameters", {}).get("binary_data_size")
    if size is None:
        return np.asarray(first["data"], np.float64).ravel()
    return np.frombuffer(data[at : at + size], "<f4").astype(np.float64)

"""Requests of Triton: their tensors as Python's values, batches of them, and errors as answers.

What a client did wrong is answered INVALID_ARG, which HTTP spells 400; a full memory or a dead
device UNAVAILABLE, 503; anything else INTERNAL, 500, and its text stays in the server's log.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import triton_python_backend_utils as pb_utils

from internvl_edge.errors import (
    InputError,
    InternVLError,
    MediaError,
    ResourceError,
    SessionDead,
    UsageError,
)
from internvl_edge.runtime.images.reading import DATA_URL
from internvl_edge.types import Array

__all__ = ["answered", "failure", "number", "picture", "response", "rows_of", "text_of"]

Row = TypeVar("Row")
Outputs = dict[str, Any]  # of one row: name → its value


def rows_of(request: Any, name: str) -> Array | None:
    """Return an input with a row for each of the batch; None where it was left out."""
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    return None if tensor is None else tensor.as_numpy()


def number(request: Any, name: str) -> int | None:
    """Return an input of one number; None where it was left out.

    Raises:
        UsageError: it has several.
    """
    values = rows_of(request, name)
    if values is None:
        return None
    if values.size != 1:
        raise UsageError(f"{name}: expected one number, found {values.size}")
    return int(values.reshape(-1)[0])


def picture(data: bytes) -> bytes | str:
    """Return what the runtime takes for a picture: bytes of a file, or the text of a data: URL.

    JSON has no bytes, so that its clients send URLs. No other text becomes one: it would be a path.

    Raises:
        MediaError: it begins like a data: URL, and is none.
    """
    if data[:5].lower() != b"data:":
        return bytes(data)
    text = text_of(data, "image")
    if DATA_URL.match(text) is None:
        raise MediaError("image: expected a data: URL with a comma before its data, found none")
    return text


def text_of(data: bytes, name: str) -> str:
    """Decode a text.

    Raises:
        MediaError: it is not UTF-8.
    """
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise MediaError(f"{name}: expected UTF-8, found byte {data[error.start]:#04x}") from error


def response(outputs: Outputs) -> Any:
    """Make an answer of arrays; texts are an array of bytes objects."""
    return pb_utils.InferenceResponse(
        output_tensors=[pb_utils.Tensor(name, array) for name, array in outputs.items()]
    )


def answered(
    requests: Sequence[Any],
    read: Callable[[Any], Sequence[Row]],
    compute: Callable[[Sequence[Row]], Sequence[Outputs]],
    failed: Callable[[Exception], Any],
) -> list[Any]:
    """Answer requests as one batch; where that fails, each alone, so that one takes no other along.

    Args:
        requests: of one call.
        read: the rows of a request.
        compute: the outputs of each row.
        failed: makes the answer to a request that failed.
    """
    answers: list[Any] = [None] * len(requests)
    read_rows: dict[int, Sequence[Row]] = {}
    for i, request in enumerate(requests):
        try:
            read_rows[i] = read(request)
        except Exception as error:
            answers[i] = failed(error)
    try:
        every = [row for rows in read_rows.values() for row in rows]
        done = iter(compute(every) if every else ())
        for i, rows in read_rows.items():
            answers[i] = _stacked([next(done) for _ in rows])
    except Exception as error:
        if len(read_rows) == 1 or isinstance(error, SessionDead):
            return [failed(error) if i in read_rows else answers[i] for i in range(len(requests))]
        for i in read_rows:
            answers[i] = answered([requests[i]], read, compute, failed)[0]
    return answers


def _stacked(rows: Sequence[Outputs]) -> Any:
    return response({name: np.stack([row[name] for row in rows]) for name in rows[0]})


def failure(error: Exception) -> Any:
    """Turn an error into what Triton answers with."""
    if isinstance(error, InputError | UsageError):
        return pb_utils.TritonError(str(error), pb_utils.TritonError.INVALID_ARG)
    if isinstance(error, ResourceError | SessionDead):
        return pb_utils.TritonError(str(error), pb_utils.TritonError.UNAVAILABLE)
    said = (
        str(error)
        if isinstance(error, InternVLError)
        else "".join(traceback.format_exception(error))
    )
    pb_utils.Logger.log_error(said)
    return pb_utils.TritonError("the model failed; its log says why", pb_utils.TritonError.INTERNAL)

"""A stand-in for ``triton_python_backend_utils``, which exists within Triton alone.

As much of it as the models use, with the same names, and as strict as it about what it takes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from internvl_edge.types import Array

TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1
TRITONSERVER_MEMORY_CPU = 0


class TritonError:
    UNKNOWN, INTERNAL, NOT_FOUND, INVALID_ARG, UNAVAILABLE = range(5)

    def __init__(self, message: str, code: int = INTERNAL) -> None:
        assert isinstance(message, str)
        self._message, self._code = message, code

    def message(self) -> str:
        return self._message

    def code(self) -> int:
        return self._code


class Tensor:
    def __init__(self, name: str, array: Array) -> None:
        assert isinstance(array, np.ndarray)
        if array.dtype == object:
            assert all(isinstance(value, bytes) for value in array.reshape(-1))
        self._name, self._array = name, array

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> Array:
        return self._array


class InferenceResponse:
    def __init__(
        self, output_tensors: Sequence[Tensor] = (), error: TritonError | None = None
    ) -> None:
        assert error is None or isinstance(error, TritonError)
        self.tensors, self._error = {t.name(): t.as_numpy() for t in output_tensors}, error

    def has_error(self) -> bool:
        return self._error is not None

    def error(self) -> TritonError:
        assert self._error is not None
        return self._error


@dataclass(slots=True)
class Sender:
    """What responses of a stream are sent by."""

    responses: list[InferenceResponse] = field(default_factory=list)
    is_over: bool = False
    cancels_after: int | None = None  # responses

    def send(self, response: InferenceResponse | None = None, flags: int = 0) -> None:
        assert not self.is_over, "a response after the last one"
        if response is not None:
            self.responses.append(response)
        self.is_over = flags == TRITONSERVER_RESPONSE_COMPLETE_FINAL

    def is_cancelled(self) -> bool:
        return self.cancels_after is not None and len(self.responses) >= self.cancels_after


class Request:
    """What ``execute`` gets."""

    def __init__(self, sender: Sender | None = None, **inputs: Array) -> None:
        self.inputs, self.sender = inputs, sender

    def get_response_sender(self) -> Sender:
        assert self.sender is not None
        return self.sender


def get_input_tensor_by_name(request: Request, name: str) -> Tensor | None:
    return Tensor(name, request.inputs[name]) if name in request.inputs else None


def get_output_tensor_by_name(response: InferenceResponse, name: str) -> Tensor:
    return Tensor(name, response.tensors[name])


@dataclass(frozen=True, slots=True)
class PreferredMemory:
    kind: int
    device: int


class InferenceRequest:
    """A request to another model; ``other`` answers it."""

    other: ClassVar[Callable[[InferenceRequest], InferenceResponse]]

    def __init__(
        self,
        model_name: str,
        requested_output_names: Sequence[str],
        inputs: Sequence[Tensor],
        preferred_memory: PreferredMemory,
    ) -> None:
        self.model_name, self.names = model_name, list(requested_output_names)
        self.inputs = {tensor.name(): tensor.as_numpy() for tensor in inputs}

    def exec(self) -> Any:
        return type(self).other(self)


class Logger:
    said: ClassVar[list[str]] = []

    @staticmethod
    def log_error(message: str) -> None:
        Logger.said.append(message)

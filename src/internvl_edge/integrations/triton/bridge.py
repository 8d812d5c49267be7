"""A session whose component is another model of the same Triton."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

import triton_python_backend_utils as pb_utils

from internvl_edge.artifact.manifest import ComponentRecord, TensorSpec
from internvl_edge.errors import InternVLError, ResourceError
from internvl_edge.runtime.feeds import check_feeds, check_outputs
from internvl_edge.types import Array

__all__ = ["BridgeSession"]


class BridgeSession:
    """A component that another model of Triton computes; ``Session`` says what it does.

    Args:
        record: the component, whose tensors the model has.
        model: its name.
    """

    def __init__(self, record: ComponentRecord, model: str) -> None:
        self._model = model
        self._inputs = {spec.name: spec for spec in record.inputs}
        self._outputs = {spec.name: spec for spec in record.outputs}
        self.largest: Mapping[str, int] = {}  # Triton's scheduler bounds both models alike

    @property
    def inputs(self) -> Mapping[str, TensorSpec]:
        return self._inputs

    @property
    def outputs(self) -> Mapping[str, TensorSpec]:
        return self._outputs

    def run(
        self,
        feeds: Mapping[str, Array],
        *,
        check: bool = True,
        outputs: Sequence[str] | None = None,
    ) -> dict[str, Array]:
        """See ``Session.run``."""
        names = list(self._outputs) if outputs is None else check_outputs(self._outputs, outputs)
        arrays = check_feeds(self._inputs, feeds, check)
        answer = pb_utils.InferenceRequest(
            model_name=self._model,
            requested_output_names=names,
            inputs=[pb_utils.Tensor(name, array) for name, array in arrays.items()],
            preferred_memory=pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU, 0),
        ).exec()
        if answer.has_error():
            raise self._error(answer.error())
        return {name: pb_utils.get_output_tensor_by_name(answer, name).as_numpy() for name in names}

    def _error(self, error: Any) -> InternVLError:
        text = f"{self._model}: {error.message()}"
        is_full = error.code() == pb_utils.TritonError.UNAVAILABLE
        return ResourceError(text) if is_full else InternVLError(text)

    def close(self) -> None:
        """See ``Session.close``; the model is Triton's."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

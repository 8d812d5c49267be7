"""NVIDIA's Triton Inference Server: a model repository, and the models that run within it.

repository   ``internvl-edge triton OUT -o REPO``: what is written, whole or not at all; start here
options      what it can be told, and what it refuses
tasks        the table of what is served: tensors, the class, the components that it needs
front        a task as a model in Python;  component  the one that Triton's own backends run
folder       a model's folder before it is written;  config  ``config.pbtxt``;  readme  README.md
models       ``EmbedImage``, ``EmbedText``, ``Classify``, ``Generate``: called by Triton
requests     tensors of requests, and errors as Triton has them
bridge       a session whose component is another model of the same Triton

``models``, ``requests`` and ``bridge`` import ``triton_python_backend_utils``, which exists within
Triton alone; the rest needs nothing but this package.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from internvl_edge.integrations.triton.models import Classify, EmbedImage, EmbedText, Generate

__all__ = ["Classify", "EmbedImage", "EmbedText", "Generate"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.models"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

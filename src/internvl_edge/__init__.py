"""Compile InternVL checkpoints into fast inference engines, and run them.

import internvl_edge

with internvl_edge.load("compiled") as model:
    embeddings = model.encode_image(["photo.jpg"], normalize=True)
"""

from __future__ import annotations

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

from internvl_edge._version import __version__
from internvl_edge.errors import InternVLError
from internvl_edge.files import telemetry

if TYPE_CHECKING:
    from internvl_edge.runtime.generation.answers import AnswerOptions
    from internvl_edge.runtime.images.options import ImageOptions
    from internvl_edge.runtime.model import load
    from internvl_edge.runtime.openvino.options import OpenVinoOptions
    from internvl_edge.runtime.ort.options import OrtOptions, share_threads
    from internvl_edge.runtime.session import open_session
    from internvl_edge.runtime.trt.options import TrtOptions

__all__ = [
    "AnswerOptions",
    "ImageOptions",
    "InternVLError",
    "OpenVinoOptions",
    "OrtOptions",
    "TrtOptions",
    "__version__",
    "load",
    "open_session",
    "share_threads",
]

telemetry.turn_off()  # before anything imports ONNX Runtime

# A library leaves it to its user where messages go.
logging.getLogger(__name__).addHandler(logging.NullHandler())

_LAZY = {
    "AnswerOptions": "internvl_edge.runtime.generation.answers",
    "ImageOptions": "internvl_edge.runtime.images.options",
    "load": "internvl_edge.runtime.model",
    "open_session": "internvl_edge.runtime.session",
    "OpenVinoOptions": "internvl_edge.runtime.openvino.options",
    "OrtOptions": "internvl_edge.runtime.ort.options",
    "share_threads": "internvl_edge.runtime.ort.options",
    "TrtOptions": "internvl_edge.runtime.trt.options",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})

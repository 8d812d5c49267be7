"""The thin runtime: a compiled directory in; embeddings, labels and text out.

    model       what people ask for, as methods of one object; start here
    tasks       the same as functions: embed, compare, caption, chat
    components  the open components of a directory: sessions, tokenizer, image transforms
    session     the ``Session`` protocol, and the choice of a backend
    feeds       what a session accepts
    ort, trt    ONNX Runtime, TensorRT and TensorRT-RTX as sessions;  gpu  CUDA for them
    openvino    OpenVINO as a session of what sees images, on the CPU
    generation  tokens one after the other on a decoder's cache
    images      pictures and videos to ``pixel_values``;  text  texts to ids, and back
    batching    requests of many threads as few batches

Importing this package imports NumPy and nothing heavier; a backend is imported when it opens.
"""

from __future__ import annotations

if __name__ != "internvl_edge.runtime":
    raise ImportError(f"import internvl_edge.runtime, not {__name__} from the repository's folder")

from internvl_edge.runtime.batching import Batcher
from internvl_edge.runtime.feeds import check_feeds
from internvl_edge.runtime.images.options import ImageOptions
from internvl_edge.runtime.model import Model, Retrieval, load
from internvl_edge.runtime.openvino.options import OpenVinoOptions
from internvl_edge.runtime.ort.options import OrtOptions
from internvl_edge.runtime.session import DecoderSession, Session, open_session
from internvl_edge.runtime.trt.options import TrtOptions

__all__ = [
    "Batcher",
    "DecoderSession",
    "ImageOptions",
    "Model",
    "OpenVinoOptions",
    "OrtOptions",
    "Retrieval",
    "Session",
    "TrtOptions",
    "check_feeds",
    "load",
    "open_session",
]

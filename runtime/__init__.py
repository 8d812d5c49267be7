"""The thin runtime: a compiled directory in; embeddings, labels and text out.

    session   the ``Session`` protocol, the choice of a backend;  feeds  what it accepts
    ort       ONNX Runtime behind that protocol;  ortoptions  how and where it computes
    trt       TensorRT and TensorRT-RTX: device, cuda, vendor, engine, profiles, contexts, slot,
              blocks;  device_array, dlpack  arrays of the GPU, to and from other libraries
    image     pictures to ``pixel_values``;  video  frames;  tokenizer  texts to ids
    requests  what callers hand over;  vectors  arithmetic on embeddings
    batching  requests of many threads as few batches
    generate  tokens on a decoder's cache;  speak  text about images with it
    chat      conversations;  templates  how they are spelled;  chattokens  their ids;
              table  the token embedding
    parts     what of a directory is open;  embedding  images, texts, videos to vectors
    model     what people ask for: encode, classify, retrieve, match, caption, answer,
              chat
    bench     honest timing;  scenarios  under load;  phases  the GPU's part of a call;
              environment  where it was measured

Importing this package imports NumPy and nothing heavier; a backend is imported when it opens.
"""

from __future__ import annotations

if __name__ != "internvl_edge.runtime":
    raise ImportError(f"import internvl_edge.runtime, not {__name__} from the repository's folder")

from internvl_edge.runtime.model import Model, Retrieval, load
from internvl_edge.runtime.session import Session, check_feeds, open_session

__all__ = ["Model", "Retrieval", "Session", "check_feeds", "load", "open_session"]

"""``POST /v1/embeddings``: texts and images as vectors, in four dialects told apart by their keys.

    {"input": "text" | ["text", ...]}                                   OpenAI's
    {"input": [{"text": ...} | {"image": DATA-URL}, ...]}               Jina's
    {"input": DATA-URL | [DATA-URL, ...], "modality": "image"}          Infinity's
    {"messages": [{"role": "user", "content": [ONE part]}]}             vLLM's

Images and texts of a request are computed together and come back in their order; one bad item fails
the request.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Sequence
from typing import Any, get_args

import numpy as np

from internvl_edge.runtime.images.transform import Transform
from internvl_edge.runtime.tasks.vectors import unit
from internvl_edge.serve.http.exchange import Call
from internvl_edge.serve.http.fields import Fields, require_text
from internvl_edge.serve.http.images import ImageUrl, image_url
from internvl_edge.serve.http.problems import Problem, bad_request
from internvl_edge.serve.models.served import ServedModel
from internvl_edge.serve.routes.messages import one_item
from internvl_edge.serve.service import Service
from internvl_edge.types import Array

__all__ = ["Item", "embed_items", "embeddings", "item_of", "read_mode"]

Item = ImageUrl | str
MAX_TEXTS = 2048  # of a request
MODES = ("c", "g")


async def embeddings(service: Service, call: Call) -> Any:
    """Answer a request for embeddings."""
    fields = Fields(call.content)
    served = service.find(fields.take("model"))
    call.model = served.name
    if fields.has("messages"):
        items: list[Item] = [one_item(fields.take("messages"))]
    else:
        items = _input(fields, service.options.max_images)
    as_base64 = fields.choice("encoding_format", ("float", "base64"), "float") == "base64"
    _require_dimensions(served, fields)
    mode, normalize = read_mode(fields), fields.flag("normalize", default=True)
    transform = fields.choice("transform", ("", *get_args(Transform)), "")
    fields.ignore("user", "metadata", "store")
    fields.end()
    with served.place():
        vectors, tokens = await embed_items(
            served,
            items,
            call,
            mode,
            transform or None,  # type: ignore[arg-type]
        )
    service.meters.tokens.labels(kind="prompt").inc(tokens)
    rows = unit(vectors) if normalize else vectors
    return {
        "object": "list",
        "data": [
            {"object": "embedding", "index": i, "embedding": _spelled(row, as_base64)}
            for i, row in enumerate(rows)
        ],
        "model": served.name,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }


async def embed_items(
    served: ServedModel,
    items: Sequence[Item],
    call: Call,
    mode: str = "c",
    transform: Transform | None = None,
) -> tuple[Array, int]:
    """Embed images and texts, float32 [B,E] in their order; also count the tokens of the texts."""
    urls = [item for item in items if isinstance(item, ImageUrl)]
    texts = [item for item in items if isinstance(item, str)]
    if not texts:
        return await served.embed_images(urls, mode, transform, call.stages), 0
    if not urls:
        return await served.embed_texts(texts, call.stages)
    both = asyncio.gather(
        served.embed_images(urls, mode, transform, call.stages),
        served.embed_texts(texts, call.stages),
    )
    of_images, (of_texts, tokens) = await both
    vectors = np.empty((len(items), of_images.shape[1]), np.float32)
    is_image = np.array([isinstance(item, ImageUrl) for item in items])
    vectors[is_image], vectors[~is_image] = of_images, of_texts
    return vectors, tokens


def item_of(raw: Any, param: str) -> Item:
    """Read ``"text"``, ``{"text": ...}`` or ``{"image": DATA-URL}``."""
    if not isinstance(raw, dict):
        return require_text(raw, param)
    fields = Fields(raw, param)
    image, text = fields.take("image"), fields.take("text")
    fields.end()
    if (image is None) == (text is None):
        problem = f"{param}: expected a text or an image: there is no joint embedding"
        raise bad_request("invalid_value", problem, param)
    return require_text(text, param) if image is None else image_url(image, param)


def read_mode(fields: Fields) -> str:
    """Read which image embedding is asked for."""
    return fields.choice("mode", MODES, "c")


def _input(fields: Fields, max_images: int) -> list[Item]:
    are_images = fields.choice("modality", ("text", "image"), "text") == "image"
    raw = fields.need("input")
    given = raw if isinstance(raw, list) else [raw]
    if not 1 <= len(given) <= MAX_TEXTS:
        raise fields.wrong("input", f"expected 1 to {MAX_TEXTS} items, found {len(given)}")
    if any(type(one) is int or isinstance(one, list) for one in given):
        text = "expected texts: token ids are of another vocabulary than this model's"
        raise fields.wrong("input", text)
    params = [f"input[{i}]" for i in range(len(given))] if isinstance(raw, list) else ["input"]
    if are_images:
        items: list[Item] = [image_url(one, at) for one, at in zip(given, params, strict=True)]
    else:
        items = [item_of(one, at) for one, at in zip(given, params, strict=True)]
    count = sum(isinstance(item, ImageUrl) for item in items)
    if count > max_images:
        raise fields.wrong("input", f"expected at most {max_images} images, found {count}")
    return items


def _require_dimensions(served: ServedModel, fields: Fields) -> None:
    dimensions, own = fields.integer("dimensions", 1), served.embedding_size
    if dimensions is not None and dimensions != own:
        text = f"dimensions: this model's embeddings have {own}, found {dimensions}"
        raise Problem(400, "unsupported_parameter", text, "dimensions")


def _spelled(row: Array, as_base64: bool) -> Any:
    """Spell a vector as numbers, or as base64 of little-endian float32."""
    if not as_base64:
        return row.tolist()
    return base64.b64encode(row.astype("<f4", copy=False).tobytes()).decode("ascii")

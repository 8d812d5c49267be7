"""``POST /v1/classify`` and ``POST /v1/rerank``: zero-shot labels, and documents by their fitness.

Scores of ``classify`` are softmax(100 · cosine) over the labels; ``rerank`` gives the cosine, or
with ``"method": "match"`` how likely a text describes an image, by the matching head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from internvl_edge.runtime.tasks.compare import best_labels
from internvl_edge.runtime.tasks.embed import DEFAULT_TEMPLATES
from internvl_edge.runtime.tasks.vectors import ranked, unit
from internvl_edge.runtime.text.requests import distinct_labels, one_place_templates
from internvl_edge.serve.http.exchange import Call
from internvl_edge.serve.http.fields import Fields, require_text
from internvl_edge.serve.http.images import ImageUrl, image_url
from internvl_edge.serve.http.problems import bad_request, blamed
from internvl_edge.serve.models.served import ServedModel
from internvl_edge.serve.routes.embeddings import Item, embed_items, item_of, read_mode
from internvl_edge.serve.service import Service
from internvl_edge.types import Array

__all__ = ["classify", "rerank"]

MAX_LABELS, MAX_TEMPLATES, MAX_PROMPTS = 1000, 80, 10_000
MAX_DOCUMENTS = 2048


async def classify(service: Service, call: Call) -> Any:
    """Answer which labels fit images."""
    fields = Fields(call.content)
    served = service.find(fields.take("model"))
    call.model = served.name
    raw = fields.items("images", service.options.max_images, "images")
    urls = [image_url(one, f"images[{i}]") for i, one in enumerate(raw)]
    labels, templates = _labels(fields)
    top_k = fields.integer("top_k", 1, MAX_LABELS) or len(labels)
    mode = read_mode(fields)
    fields.ignore("user", "metadata")
    fields.end()
    with served.place():
        embeds = await served.embed_images(urls, mode, "classification", call.stages)
        weights = await served.label_weights(labels, templates, call.stages)
    ranks = best_labels(labels, unit(embeds), weights, top_k)
    data = [{"index": i, "labels": best} for i, best in enumerate(ranks)]
    return {"object": "list", "model": served.name, "data": data}


async def rerank(service: Service, call: Call) -> Any:
    """Answer which documents fit a query, best first."""
    fields = Fields(call.content)
    served = service.find(fields.take("model"))
    call.model = served.name
    query = item_of(fields.need("query"), "query")
    raw = fields.items("documents", MAX_DOCUMENTS, "documents")
    documents = [item_of(one, f"documents[{i}]") for i, one in enumerate(raw)]
    count = sum(isinstance(one, ImageUrl) for one in documents)
    if count > service.options.max_images:
        most = service.options.max_images
        raise fields.wrong("documents", f"expected at most {most} images, found {count}")
    top_n = fields.integer("top_n", 1) or len(documents)
    returns = fields.flag("return_documents")
    method, mode = fields.choice("method", ("cosine", "match"), "cosine"), read_mode(fields)
    fields.ignore("user", "metadata")
    fields.end()
    score = _matched if method == "match" else _cosine
    with served.place():
        scores, tokens = await score(served, query, documents, call, mode)
    service.meters.tokens.labels(kind="prompt").inc(tokens)
    results = [
        {"index": int(i), "relevance_score": float(scores[i])}
        | ({"document": _returned(raw[i])} if returns else {})
        for i in ranked(scores)[:top_n]
    ]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"id": f"rerank-{call.id}", "model": served.name, "results": results, "usage": usage}


async def _cosine(
    served: ServedModel, query: Item, documents: Sequence[Item], call: Call, mode: str
) -> tuple[Array, int]:
    vectors, tokens = await embed_items(served, [query, *documents], call, mode, "retrieval")
    rows = unit(vectors)
    scores: Array = rows[1:] @ rows[0]
    return scores, tokens


async def _matched(
    served: ServedModel, query: Item, documents: Sequence[Item], call: Call, _: str
) -> tuple[Array, int]:
    urls = [one for one in documents if isinstance(one, ImageUrl)]
    texts = [one for one in documents if isinstance(one, str)]
    if isinstance(query, str) and not texts:
        return await served.match(urls, [query], call.stages)
    if isinstance(query, ImageUrl) and not urls:
        return await served.match([query], texts, call.stages)
    text = "method: match goes with a text and images, or with an image and texts"
    raise bad_request("invalid_value", text, "method")


def _labels(fields: Fields) -> tuple[tuple[str, ...], tuple[str, ...]]:
    raw = fields.items("labels", MAX_LABELS, "labels")
    names = [require_text(one, f"labels[{i}]") for i, one in enumerate(raw)]
    patterns = list(DEFAULT_TEMPLATES)
    if fields.has("templates"):
        raw = fields.items("templates", MAX_TEMPLATES, "templates")
        patterns = [require_text(one, f"templates[{i}]") for i, one in enumerate(raw)]
    if len(names) * len(patterns) > MAX_PROMPTS:
        text = f"expected at most {MAX_PROMPTS} prompts, found {len(names)} x {len(patterns)}"
        raise fields.wrong("labels", text)
    with blamed("labels", "invalid_value"):
        labels = distinct_labels(names)
    with blamed("templates", "invalid_value"):
        one_place_templates(patterns)
    return labels, tuple(patterns)


def _returned(raw: Any) -> Any:
    """Give a document back as an object."""
    return {"text": raw} if isinstance(raw, str) else raw

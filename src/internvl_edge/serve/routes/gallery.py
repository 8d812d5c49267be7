"""``/gallery``: pictures of a folder, searched by a text or a picture, and shown by number."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from internvl_edge.runtime.tasks.vectors import unit
from internvl_edge.serve.http.exchange import Call, json_response
from internvl_edge.serve.http.fields import Fields, require_text
from internvl_edge.serve.http.problems import Problem, bad_request
from internvl_edge.serve.routes.embeddings import Item, embed_items, item_of
from internvl_edge.serve.service import Service

__all__ = ["count", "picture", "search", "search_by_text"]

MOST_DIGITS = 6
USUAL, MOST = 24, 200  # pictures of an answer


def count(service: Service, _: Request) -> Response:
    """Say how many pictures there are."""
    return json_response({"count": len(service.gallery.small)})


def picture(service: Service, request: Request) -> Response:
    """Give a small picture."""
    number = whole(request.path_params["number"])
    if number is None or number >= len(service.gallery.small):
        raise Problem(404, "not_found", "the gallery has no such picture")
    headers = {"cache-control": "private, max-age=3600"}
    return Response(service.gallery.small[number], headers=headers, media_type="image/jpeg")


async def search_by_text(service: Service, request: Request) -> Response:
    """Answer ``?q=TEXT``."""
    service.require_open()
    query = request.query_params
    text = require_text(query.get("q"), "q")
    top_k = whole(query.get("top_k", str(USUAL))) or 0
    try:
        async with asyncio.timeout(service.options.timeout_s):
            content = await _found(service, Call.of(request.scope), query.get("model"), text, top_k)
    except TimeoutError:
        text = f"not done within {service.options.timeout_s:g} s"
        raise Problem(504, "timeout", text) from None
    return json_response(content)


async def search(service: Service, call: Call) -> Any:
    """Answer which pictures fit a text or a picture best."""
    fields = Fields(call.content)
    name, top_k = fields.take("model"), fields.integer("top_k", 1, MOST) or USUAL
    given = {key: fields.take(key) for key in ("text", "image")}
    fields.end()
    item = item_of({key: value for key, value in given.items() if value is not None}, "query")
    return await _found(service, call, name, item, top_k)


async def _found(service: Service, call: Call, name: Any, item: Item, top_k: int) -> Any:
    served = service.find(name)
    call.model = served.name
    if not 1 <= top_k <= MOST:
        raise bad_request("invalid_value", f"top_k: expected 1 to {MOST}", "top_k")
    if not service.gallery.small:
        raise Problem(404, "not_found", "this server has no gallery")
    if not service.gallery.has(served.name):
        raise bad_request("missing_component", "this model embeds no pictures and texts", "model")
    with served.place():
        vectors, _ = await embed_items(served, [item], call, "c", "retrieval")
    found = service.gallery.search(served.name, unit(vectors)[0], top_k)
    data = [{"index": number, "score": score} for number, score in found]
    return {"object": "list", "model": served.name, "data": data}


def whole(text: str) -> int | None:
    """Read a number of a few digits; None where it is none."""
    return int(text) if text.isascii() and text.isdigit() and len(text) <= MOST_DIGITS else None

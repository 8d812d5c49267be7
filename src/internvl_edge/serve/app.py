"""All routes as one application, after the gate that every request passes."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from inspect import isawaitable
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Match, Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send

from internvl_edge.serve.http.exchange import Call, JsonRoute
from internvl_edge.serve.http.gate import Gate
from internvl_edge.serve.http.problems import Problem
from internvl_edge.serve.routes import chat, compare, embeddings, gallery, listing, page
from internvl_edge.serve.service import Service

__all__ = ["make_app"]

Posted = Callable[[Service, Call], Awaitable[Any]]
Read = Callable[[Service, Request], Any]  # a response, or one that is awaited

OPEN = frozenset({"/health", "/live"})  # no key is asked for
EXACT = frozenset({"/v1/embeddings", "/v1/chat/completions", "/v1/classify", "/v1/rerank"})
UNKNOWN = "unknown"  # the label of whatever is no route


def make_app(service: Service) -> ASGIApp:
    """Make the application of a service."""
    posted: dict[str, Posted] = {
        "/v1/embeddings": embeddings.embeddings,
        "/v1/chat/completions": chat.completions,
        "/v1/classify": compare.classify,
        "/v1/rerank": compare.rerank,
        "/gallery/search": gallery.search,
    }
    read: dict[str, Read] = {
        "/v1/models": listing.models,
        "/v1/models/{id}": listing.model,
        "/health": listing.health,
        "/live": listing.live,
        "/metrics": listing.metrics,
        "/gallery": gallery.count,
        "/gallery/search": gallery.search_by_text,
        "/gallery/{number}.jpg": gallery.picture,
    }
    files = page.FILES if service.options.page else page.FILES_WITHOUT_PAGE
    read |= {path: partial(page.file, name) for path, name in files.items()}
    routes: list[BaseRoute] = [
        _route(path, service, posted.get(path), read.get(path))
        for path in dict.fromkeys([*posted, *read])
    ]
    router = Router(routes, redirect_slashes=False, default=_unknown)
    is_open = (OPEN | set(files)).__contains__
    label = partial(_label, routes)
    return Gate(
        router,
        service.options,
        service.meters,
        label,
        is_open,
        service.told,
        lambda: service.state == "ending",
    )


def _route(path: str, service: Service, posted: Posted | None, read: Read | None) -> Route:
    """Make the route of a path: what a POST and what a GET are answered with."""
    apps: dict[str, ASGIApp] = {}
    if posted is not None:
        answer = partial(posted, service)
        timeout_s = service.options.timeout_s
        apps["POST"] = JsonRoute(answer, service.require_open, service.bodies, timeout_s)
    if read is not None:
        apps["GET"] = apps["HEAD"] = _reading(service, read)

    async def chosen(scope: Scope, receive: Receive, send: Send) -> None:
        await apps[scope["method"]](scope, receive, send)

    return Route(path, _App(chosen), methods=[*apps])


class _App:
    """An application that Starlette does not take for a function of a request."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)


def _reading(service: Service, read: Read) -> ASGIApp:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        given = read(service, Request(scope, receive))
        response: Response = await given if isawaitable(given) else given
        await response(scope, receive, send)

    return app


async def _unknown(scope: Scope, receive: Receive, send: Send) -> None:
    raise Problem(404, "not_found", "there is no such route")


def _label(routes: list[BaseRoute], path: str) -> str:
    """Find the route of a path, as it is written here: never what a client sent."""
    if path in EXACT:
        return path
    scope = {"type": "http", "path": path, "method": "GET"}
    for route in routes:
        if isinstance(route, Route) and route.matches(scope)[0] is not Match.NONE:
            return route.path
    return UNKNOWN

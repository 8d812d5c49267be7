"""A request from its first to its last byte: its JSON is read, answered in time, or given up.

A client that leaves cancels what is computed for it: what is queued never runs, and a stream stops
between two tokens.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from internvl_edge.serve.http.body import Bodies
from internvl_edge.serve.http.json_text import as_json, parsed
from internvl_edge.serve.http.meters import Stages
from internvl_edge.serve.http.problems import ClientGone, Problem

__all__ = ["Call", "JsonRoute", "json_response"]

LARGE_BODY = 1 << 18  # bytes: parsed by a thread
QUICK_S = 0.02  # after which a client may have left


@dataclass(slots=True, kw_only=True)
class Call:
    """One request, as its route sees it; kept in the scope."""

    id: str
    route: str  # of ours: a label
    model: str = ""  # that is served: a label
    stages: Stages = field(default_factory=Stages)
    content: Any = None  # the JSON

    @staticmethod
    def of(scope: Scope) -> Call:
        call: Call = scope["internvl_edge.call"]
        return call


def json_response(
    content: Any, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """Make an answer of JSON."""
    body = as_json(content).encode("utf-8")
    return Response(body, status, headers, media_type="application/json")


class JsonRoute:
    """An application that takes JSON and gives what a function makes of it.

    Args:
        answer: of a call; a response, or content of one.
        require_open: refuses while nothing can be answered.
        bodies: in memory.
        timeout_s: in which an answer has to begin.
    """

    def __init__(
        self,
        answer: Callable[[Call], Awaitable[Any]],
        require_open: Callable[[], None],
        bodies: Bodies,
        timeout_s: float,
    ) -> None:
        self._answer, self._require_open = answer, require_open
        self._bodies, self._timeout_s = bodies, timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers, call = Headers(scope=scope), Call.of(scope)
        self._require_open()
        _require_json(headers)
        async with self._bodies.reading(headers, receive) as body:
            is_large = len(body) > LARGE_BODY
            call.content = await asyncio.to_thread(parsed, body) if is_large else parsed(body)
            del body
            try:
                answer = await self._while_there(call, receive)
            finally:
                call.content = None  # the connection keeps the call until its next request
            if not isinstance(answer, Response):
                answer = json_response(answer)
        await answer(scope, receive, send)

    async def _while_there(self, call: Call, receive: Receive) -> Any:
        """Answer, unless the client leaves or it takes too long."""
        answering = asyncio.ensure_future(self._in_time(call))
        leaving = None
        try:
            await asyncio.wait((answering,), timeout=QUICK_S)
            if not answering.done():  # nobody leaves sooner, and most are answered by now
                leaving = asyncio.ensure_future(receive())
                await asyncio.wait((answering, leaving), return_when=asyncio.FIRST_COMPLETED)
            if answering.done():
                return answering.result()
            raise ClientGone
        finally:
            if leaving is not None:
                leaving.cancel()
            if not answering.done():
                answering.cancel()
                await asyncio.gather(answering, return_exceptions=True)
            # An error's traceback has this frame: with the task in it, both would stay for a while,
            # and with them whatever the request held.
            del answering, leaving

    async def _in_time(self, call: Call) -> Any:
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._answer(call)
        except TimeoutError:
            text = f"not done within {self._timeout_s:g} s"
            raise Problem(504, "timeout", text) from None


def _require_json(headers: Headers) -> None:
    media = headers.get("content-type", "").partition(";")[0].strip().lower()
    if media != "application/json":
        text = "content-type: expected application/json"
        raise Problem(415, "unsupported_media_type", text)

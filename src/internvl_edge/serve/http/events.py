"""Answers as server-sent events: one by one as they come, with a sign of life in between.

A client that leaves ends the answer. One that does not read is cut off by the connection
(``serve.server``), and until then the events wait where they are made.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from internvl_edge.serve.http.json_text import as_json
from internvl_edge.serve.http.problems import ClientGone, Problem

__all__ = ["EventStream"]

PING_S = 15.0
DONE = b"data: [DONE]\n\n"


class EventStream(Response):
    """An answer of JSON objects, each sent as it comes.

    Args:
        events: the objects.
        failed: makes what a client is told of an error, which ends the events.
        ended: is called when nothing more is sent, in any case.
    """

    def __init__(
        self,
        events: AsyncIterator[Any],
        failed: Callable[[Exception], Problem],
        ended: Callable[[], None],
    ) -> None:
        super().__init__(
            headers={"cache-control": "no-cache", "x-accel-buffering": "no"},
            media_type="text/event-stream",
        )
        self._events, self._failed, self._ended = events, failed, ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        tasks = [asyncio.ensure_future(self._write(send)), asyncio.ensure_future(receive())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if not tasks[0].done():
                raise ClientGone
            tasks[0].result()
        finally:
            self._ended()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _write(self, send: Send) -> None:
        headers = [(k, v) for k, v in self.raw_headers if k != b"content-length"]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        try:
            async for event in self._with_pings():
                await send({"type": "http.response.body", "body": event, "more_body": True})
        except Exception as error:
            content = self._failed(error).content
            await send({"type": "http.response.body", "body": as_event(content), "more_body": True})
        await send({"type": "http.response.body", "body": DONE, "more_body": False})

    async def _with_pings(self) -> AsyncIterator[bytes]:
        waiting = None
        try:
            while True:
                waiting = waiting or asyncio.ensure_future(anext(self._events, None))
                await asyncio.wait((waiting,), timeout=PING_S)
                if not waiting.done():
                    yield b": ping\n\n"
                    continue
                event, waiting = waiting.result(), None
                if event is None:
                    return
                yield as_event(event)
        finally:
            if waiting is not None:
                waiting.cancel()
                await asyncio.gather(waiting, return_exceptions=True)


def as_event(content: Any) -> bytes:
    """Spell an event; its JSON has no line breaks."""
    return f"data: {as_json(content)}\n\n".encode()

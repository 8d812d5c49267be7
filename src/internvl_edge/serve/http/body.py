"""Bodies, counted while they are read: each has a limit, and so have all of them together.

What is too large is read on for a while and dropped, so that a client that sends all before it
reads learns why it was refused.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from starlette.datastructures import Headers
from starlette.types import Receive

from internvl_edge.files.memory import trim
from internvl_edge.serve.http.problems import ClientGone, Problem, overloaded

__all__ = ["Bodies", "has_body"]

BODY_S = 30.0  # for a whole body
DRAIN_S = 5.0  # for what is dropped
DRAINED = 4  # times the limit
HUGE, TRIM_S = 8 << 20, 1.0  # bytes of bodies after which memory is given back, and how soon


def has_body(headers: Headers) -> bool:
    """Tell whether a request says that a body follows."""
    return headers.get("content-length", "0").strip() != "0" or "transfer-encoding" in headers


class Bodies:
    """The bodies in memory.

    Args:
        most: bytes of one.
        most_together: bytes of all.
        patience_s: in which a body has to come.
    """

    def __init__(self, most: int, most_together: int, patience_s: float = BODY_S) -> None:
        self._most, self._most_together, self._patience_s = most, most_together, patience_s
        self.nbytes = 0
        self._since = 0  # bytes of bodies since memory was given back
        self._later: asyncio.TimerHandle | None = None

    @asynccontextmanager
    async def reading(self, headers: Headers, receive: Receive) -> AsyncIterator[bytes]:
        """Read a body, which counts until the context is left.

        Raises:
            Problem: it is too large, did not come in time, or too many are in memory.
            ClientGone: it ends before its end.
        """
        declared = headers.get("content-length", "")
        length = int(declared) if re.fullmatch(r"\d{1,18}", declared) else 0
        if length > self._most:
            if "expect" not in headers:
                await self._drop(receive, self._most * DRAINED)
            raise self._too_large()
        whole = [await self._whole(receive)]
        held = len(whole[0])
        try:
            yield whole.pop()  # nothing here keeps it
        finally:
            self._give(held)

    async def _whole(self, receive: Receive) -> bytes:
        """Read a body, which counts from here on; one that is refused does not."""
        chunks: list[bytes] = []
        try:
            async with asyncio.timeout(self._patience_s):
                refused = await self._read(receive, chunks)
        except BaseException as error:
            self._give(sum(map(len, chunks)))
            if isinstance(error, TimeoutError):
                text = f"the body did not come within {self._patience_s:g} s"
                raise Problem(408, "request_timeout", text) from None
            raise
        if refused is None:
            return b"".join(chunks)
        self._give(sum(map(len, chunks)))
        chunks.clear()
        await self._drop(receive, self._most * DRAINED)
        raise refused

    def _give(self, nbytes: int) -> None:
        """Count a body no more; after large ones, let the system have their memory soon."""
        self.nbytes -= nbytes
        self._since += nbytes
        if self._since > HUGE and self._later is None:
            self._later = asyncio.get_running_loop().call_later(TRIM_S, self._trim)

    def _trim(self) -> None:
        self._later, self._since = None, 0
        asyncio.get_running_loop().run_in_executor(None, trim)

    async def _read(self, receive: Receive, chunks: list[bytes]) -> Problem | None:
        """Read all chunks, or say why not; each counts as soon as it is in the list."""
        held = 0
        while True:
            message = await receive()
            if message["type"] != "http.request":
                raise ClientGone
            chunk = message.get("body", b"")
            held += len(chunk)
            if held > self._most:
                return self._too_large()
            if self.nbytes + len(chunk) > self._most_together:
                return overloaded("too many bodies are in memory; try again later")
            if chunk:
                self.nbytes += len(chunk)
                chunks.append(chunk)
            if not message.get("more_body", False):
                return None

    async def _drop(self, receive: Receive, most: int) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_S):
                while most > 0:
                    message = await receive()
                    if message["type"] != "http.request" or not message.get("more_body", False):
                        return
                    most -= len(message.get("body", b""))

    def _too_large(self) -> Problem:
        text = f"the body is larger than {self._most} bytes"
        return Problem(413, "request_too_large", text)

"""The gate that every request passes: who may ask, what it is counted as, and how errors look.

Nothing of a client's headers comes back in an answer: a request's id is made here. A request whose
body was not read to its end closes its connection, so that nothing in it is taken for another one.

Without a key, a server of one machine answers only to that machine's own names: a page of the web
that has its name point to 127.0.0.1 is refused, by the Host that its browser sends.
"""

from __future__ import annotations

import hmac
import uuid
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from internvl_edge.serve.http.body import has_body
from internvl_edge.serve.http.exchange import Call
from internvl_edge.serve.http.meters import Meters
from internvl_edge.serve.http.problems import ClientGone, Problem
from internvl_edge.serve.options import ServeOptions, is_loopback

__all__ = ["Gate"]

GONE = 499  # the status under which a client that left is counted


class Gate:
    """An application around another.

    Args:
        app: what answers.
        options: of the server.
        meters: that count.
        label: the route of a path, as a label.
        is_open: whether a route asks for no key.
        told: makes what a client is told of an error.
        is_ending: whether connections are closed after their answer.
    """

    def __init__(
        self,
        app: ASGIApp,
        options: ServeOptions,
        meters: Meters,
        label: Callable[[str], str],
        is_open: Callable[[str], bool],
        told: Callable[[Exception, str, str], Problem],
        is_ending: Callable[[], bool],
    ) -> None:
        self._app, self._options, self._meters = app, options, meters
        self._label, self._is_open, self._told = label, is_open, told
        self._is_ending = is_ending
        self._keys = [key.encode("ascii") for key in options.keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise RuntimeError(f"expected http, found {scope['type']}")
        call = Call(id=uuid.uuid4().hex, route=self._label(scope["path"]))
        scope["internvl_edge.call"], scope["app"] = call, self  # Starlette's 405 looks for "app"
        passage = _Passage(call, Headers(scope=scope), receive, send, self._is_ending)
        try:
            self._check(call, passage.headers)
            await self._app(scope, passage.receive, passage.send)
        except ClientGone:
            passage.status = GONE
        except Exception as error:
            refusal = self._refusal(error, call)  # not the error itself, which has this frame
            if passage.status:
                raise  # an answer has begun: the connection ends
            await refusal(scope, passage.receive, passage.send)
        finally:
            status = passage.status or GONE
            self._meters.answered(call.route, call.model, status, call.stages)

    def _refusal(self, error: Exception, call: Call) -> Response:
        """Make the answer that tells an error."""
        if isinstance(error, HTTPException):
            error = _of_starlette(error)
        told = self._told(error, call.id, call.route)
        return Response(told.body, told.status, told.headers, media_type="application/json")

    def _check(self, call: Call, headers: Headers) -> None:
        """Refuse who may not ask.

        Raises:
            Problem: another machine's name, a wrong key, a body of two lengths.
        """
        if "transfer-encoding" in headers and "content-length" in headers:
            text = "expected content-length or transfer-encoding, found both"
            raise Problem(400, "invalid_value", text)
        if self._options.is_private and not self._keys:
            host = headers.get("host", "").strip().lower()
            name = host if host.endswith("]") else host.rpartition(":")[0] or host
            if name and not (is_loopback(name) or name.endswith(".localhost")):
                text = "this server answers to localhost and 127.0.0.1; open another host with keys"
                raise Problem(421, "host_not_allowed", text)
        if self._keys and not self._is_open(call.route) and not self._has_key(headers):
            if call.route == "/metrics" and self._options.is_private:
                return
            raise Problem(
                401,
                "invalid_api_key",
                "expected a key that this server knows, as: Authorization: Bearer KEY",
                headers={"WWW-Authenticate": "Bearer"},
            )

    def _has_key(self, headers: Headers) -> bool:
        scheme, _, shown = headers.get("authorization", "").partition(" ")
        given = shown.strip().encode("utf-8", "surrogateescape")
        matches = [hmac.compare_digest(given, key) for key in self._keys]  # all, in any case
        return scheme.lower() == "bearer" and any(matches)


def _of_starlette(error: HTTPException) -> Problem:
    """Make the error of a path or a method that no route has."""
    if error.status_code == 405:
        text = "this route takes another method"
        return Problem(405, "method_not_allowed", text, headers=error.headers)
    return Problem(404, "not_found", "there is no such route")


class _Passage:
    """What goes through the gate, in and out."""

    def __init__(
        self,
        call: Call,
        headers: Headers,
        receive: Receive,
        send: Send,
        is_ending: Callable[[], bool],
    ) -> None:
        self._call, self.headers, self._receive, self._send = call, headers, receive, send
        self._is_ending = is_ending
        self._is_read = not has_body(headers)
        self.status = 0

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] != "http.request" or not message.get("more_body", False):
            self._is_read = True
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            own: list[tuple[bytes, bytes]] = [
                (b"x-request-id", self._call.id.encode()),
                (b"x-content-type-options", b"nosniff"),
                (b"cross-origin-resource-policy", b"same-origin"),  # no picture in another's page
            ]
            if self._call.stages.seconds:
                own.append((b"server-timing", self._call.stages.header.encode()))
            if not self._is_read or self._is_ending():
                own.append((b"connection", b"close"))
            message = {**message, "headers": [*message.get("headers", []), *own]}
        await self._send(message)

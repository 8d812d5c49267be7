"""The server's process: its socket, connections that take too long, and its end.

uvicorn waits for ever for the head of a request and for a client that does not read; here both have
their time. SIGTERM turns ``/health`` to 503 at once; for ``drain_s`` more seconds connections are
taken as before, so that whoever sends them learns it; then none are, what is under way is answered
for at most ``grace_s``, and the process ends with 0, or 143 where that was not enough. A device
that failed for good ends it with 4, so that a new process is started.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import signal
import socket
import sys
import threading
from collections.abc import Callable, Generator
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from internvl_edge.errors import SessionDead, UsageError
from internvl_edge.serve.app import make_app
from internvl_edge.serve.http.problems import Problem
from internvl_edge.serve.options import ServeOptions
from internvl_edge.serve.service import Service

__all__ = ["bound_socket", "serve"]

logger = logging.getLogger(__name__)

MAX_CONNECTIONS = 4096
BACKLOG = 2048
MAX_HEAD_NBYTES = 64 << 10
HEAD_END = re.compile(rb"\n\r?\n")
HEAD_S = 30.0  # for the head of a request
READ_S = 30.0  # for a client to read what was sent
KEEP_ALIVE_S = 75  # longer than most balancers keep a connection
GRACE_RAN_OUT = 143
# After which a thread that computes hands over to the loop. Python's own 5 ms, several times in a
# request, doubled the median latency of a busy machine.
SWITCH_S = 5e-4


def serve(service: Service, listener: socket.socket, opened: Callable[[], None]) -> int:
    """Serve until a signal or a dead device; return the exit code of the process.

    Args:
        service: that is not open yet; it is closed here.
        listener: where connections come from.
        opened: is called once requests are answered.

    Raises:
        InternVLError: a model that cannot be opened.
    """
    _allow_connections()
    before = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_S)
    try:
        return asyncio.run(_serve(service, listener, opened))
    finally:
        sys.setswitchinterval(before)


def bound_socket(options: ServeOptions) -> socket.socket:
    """Bind the server's address.

    Raises:
        UsageError: it is taken, or none of this machine.
    """
    where = f"--host {options.host} --port {options.port}"
    try:
        found = socket.getaddrinfo(options.host, options.port, type=socket.SOCK_STREAM)
        family, kind, _, _, address = found[0]
        # With its protocol said: asyncio looks at it before it turns Nagle's algorithm off, which
        # holds the second part of an answer back for 40 ms.
        listener = socket.socket(family, kind, socket.IPPROTO_TCP)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(BACKLOG)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        reason = error.strerror or error
        raise UsageError(f"{where}: cannot be listened on: {reason}") from error
    return listener


async def _serve(service: Service, listener: socket.socket, opened: Callable[[], None]) -> int:
    options = service.options
    server = _Server(_config(service), service)
    service.died = server.stop
    loop = asyncio.get_running_loop()
    if threading.current_thread() is threading.main_thread():  # others are told by nobody
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, server.drain, options.drain_s)
    serving = asyncio.ensure_future(server.serve([listener]))
    opening = asyncio.ensure_future(asyncio.to_thread(service.open))
    try:
        await asyncio.wait((serving, opening), return_when=asyncio.FIRST_COMPLETED)
        if opening.done() and opening.exception() is None and service.state == "opening":
            service.state = "ready"
            opened()
        elif opening.done():
            server.stop()
        await serving
        await opening
    finally:
        await asyncio.to_thread(service.close)
    if service.state == "dead":
        return SessionDead.exit_code
    return GRACE_RAN_OUT if server.ran_out else 0


def _config(service: Service) -> uvicorn.Config:
    return uvicorn.Config(
        make_app(service),
        loop="asyncio",
        http=_Connection,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=max(1, round(service.options.grace_s)),
    )


class _Server(uvicorn.Server):
    """uvicorn's server, which ends as is said above."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service
        self._ending: asyncio.TimerHandle | None = None
        self.ran_out = False

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield  # the loop has them

    def drain(self, after_s: float) -> None:
        """Say that no requests should be sent here, and end in a while; at once when told twice.

        Told again, it waits for nothing that is under way.
        """
        self.force_exit = self.should_exit
        if self._ending is not None or self._service.state == "opening":
            after_s = 0
        if self._service.state != "dead":
            self._service.state = "draining"
        loop = asyncio.get_running_loop()
        self._ending = loop.call_later(after_s, self.stop)

    def stop(self) -> None:
        """Take no more connections, and end when what is under way is answered."""
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End as uvicorn does, and see whether it had to cancel anything."""
        if self._service.state == "draining":
            self._service.state = "ending"
        tasks = set(self.server_state.tasks)
        await super().shutdown(sockets)
        self.ran_out = any(not task.done() or task.cancelled() for task in tasks)


class _Parser(h11.Connection):
    """h11's parser, whose limit is of heads that are not whole yet; here it is of all."""

    def next_event(self) -> Any:
        if self.their_state is h11.IDLE:
            came, _ = self.trailing_data
            if len(came) > MAX_HEAD_NBYTES and not HEAD_END.search(came, 0, MAX_HEAD_NBYTES):
                raise h11.RemoteProtocolError("the head is too long", error_status_hint=431)
        return super().next_event()


class _Connection(H11Protocol):
    """uvicorn's connection, with a time for everything that a client does."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.conn = _Parser(h11.SERVER, MAX_HEAD_NBYTES)
        self._head: asyncio.TimerHandle | None = None
        self._reading: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > MAX_CONNECTIONS:
            transport.abort()
            return
        self._head = self.loop.call_later(HEAD_S, self._end)

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel_timers()
        super().connection_lost(exc)

    def handle_events(self) -> None:
        """Handle what came; a head has to be whole in time after its first byte."""
        super().handle_events()
        is_idle = self.cycle is None or self.cycle.response_complete
        if not is_idle and self._head is not None:
            self._head.cancel()
            self._head = None
        elif is_idle and self._head is None and self.conn.trailing_data[0]:
            self._head = self.loop.call_later(HEAD_S, self._end)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._reading = self.loop.call_later(READ_S, self.transport.abort)

    def resume_writing(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP, as every other error is told."""
        body = Problem(400, "invalid_http", msg).body
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        ]
        with contextlib.suppress(h11.LocalProtocolError):  # an answer is under way
            head = h11.Response(status_code=400, headers=headers, reason=b"Bad Request")
            for event in (head, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _end(self) -> None:
        self.transport.abort()

    def _cancel_timers(self) -> None:
        for timer in (self._head, self._reading):
            if timer is not None:
                timer.cancel()


def _allow_connections() -> None:
    """Let this process have as many connections as are taken, where the system lets it."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = 2 * MAX_CONNECTIONS
        if soft != resource.RLIM_INFINITY and soft < wanted:
            most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))

"""Servers for tests, in this process or in one of their own, and a client of theirs."""

from __future__ import annotations

import base64
import http.client
import io
import json
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from internvl_edge.serve.options import ServeOptions
from internvl_edge.serve.server import bound_socket, serve
from internvl_edge.serve.service import Service

PATIENCE_S = 60


@dataclass(frozen=True, slots=True)
class Reply:
    """What a server said."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> tuple[int, str, str | None]:
        """Status, code and param of an error, whose shape is checked."""
        error = self.json["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["message"]
        assert "Traceback" not in error["message"]
        return self.status, error["code"], error["param"]


@dataclass(slots=True)
class Served:
    """A server under test."""

    host: str
    port: int
    service: Any = None  # in this process alone
    process: Any = None  # in another

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def ask(
        self,
        path: str,
        content: Any = None,
        *,
        method: str | None = None,
        headers: Mapping[str, str] | None = None,
        body: bytes | None = None,
    ) -> Reply:
        """Send one request: a GET, or JSON where there is content."""
        if content is not None:
            body = json.dumps(content).encode()
        given = {"Content-Type": "application/json"} if body is not None else {}
        connection = http.client.HTTPConnection(self.host, self.port, timeout=PATIENCE_S)
        try:
            verb = method or ("GET" if body is None else "POST")
            connection.request(verb, path, body, {**given, **(headers or {})})
            answer = connection.getresponse()
            return Reply(answer.status, dict(answer.headers.items()), answer.read())
        finally:
            connection.close()


@contextmanager
def inside(places: Mapping[str, Path], **options: Any) -> Iterator[Served]:
    """Serve from a thread of this process, on a free port."""
    chosen = ServeOptions(**{"port": 0, "num_threads": 1, "drain_s": 0, "grace_s": 5} | options)
    service = Service(places, chosen)
    listener, opened = bound_socket(chosen), threading.Event()
    failed: list[BaseException] = []

    def run() -> None:
        try:
            serve(service, listener, opened.set)
        except BaseException as error:
            failed.append(error)
        opened.set()

    thread = threading.Thread(target=run, name="server under test")
    thread.start()
    assert opened.wait(PATIENCE_S)
    try:
        assert not failed
        yield Served("127.0.0.1", listener.getsockname()[1], service=service)
    finally:
        service.died()
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
    assert not failed


@contextmanager
def process(*arguments: str, environment: dict[str, str] | None = None) -> Iterator[Served]:
    """Serve from a process, as the command line does, on a free port."""
    command = [sys.executable, "-m", "internvl_edge", "serve", *arguments]
    command += ["--port", "0", "--threads", "1", "--json"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as running:
        try:
            assert running.stdout is not None
            said = json.loads(running.stdout.readline())
            _, _, address = said["url"].partition("://")
            host, _, port = address.rpartition(":")
            yield Served(host.strip("[]"), int(port), process=running)
        finally:
            running.kill()


def png(seed: int = 0, height: int = 32, width: int = 40) -> bytes:
    """A picture of noise."""
    levels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(levels).save(buffer, "PNG")
    return buffer.getvalue()


def data_url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def image_part(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def question(text: str, *urls: str) -> list[dict[str, Any]]:
    """Messages that ask about pictures."""
    parts = [image_part(url) for url in urls] + [{"type": "text", "text": text}]
    return [{"role": "user", "content": parts}]

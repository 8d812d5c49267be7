"""What an adversary tries, each time followed by a request that has to be answered."""

from __future__ import annotations

import contextlib
import gc
import json
import re
import socket
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.web.serving import Reply, Served, data_url, inside, png, question

from internvl_edge.serve import server
from internvl_edge.serve.http import body
from internvl_edge.serve.http.fields import Fields
from internvl_edge.serve.http.images import ImageUrl
from internvl_edge.serve.models.chats import NOTHING, Question

pytestmark = pytest.mark.slow

BODY = json.dumps({"input": "a"}).encode()
CHAT = {"messages": question("what?", data_url(png()))}
TOP = b"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\n"
MAX_BODY = 1 << 20
KEPT = (ImageUrl, Fields, Question)  # what of a request holds its pictures


@pytest.fixture(scope="module")
def attacked(compiled: Path) -> Iterator[Served]:
    with pytest.MonkeyPatch.context() as patch:
        made: list[Any] = []
        patch.setattr(server._Server, "startup", remembering(made, server._Server.startup))
        patch.setattr(server, "HEAD_S", 1.5)
        patch.setattr(server, "READ_S", 1.5)
        patch.setattr(body, "DRAIN_S", 1.0)
        with inside({"tiny": compiled}, max_body=MAX_BODY) as running:
            running.service.bodies._patience_s = 1.5
            running.process = made[0]  # its connections and tasks
            yield running


def remembering(made: list[Any], method: Any) -> Any:
    """Wrap a method, so that its object is known."""

    async def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        made.append(self)
        return await method(self, *args, **kwargs)

    return wrapped


def tasks_of(served: Served) -> set[Any]:
    """Requests under way."""
    tasks: set[Any] = served.process.server_state.tasks
    return tasks


@pytest.fixture(autouse=True)
def _the_next_request_is_answered(attacked: Served) -> Iterator[None]:
    yield
    assert attacked.ask("/v1/embeddings", {"input": "still there?"}).status == 200
    end = time.monotonic() + 10
    while tasks_of(attacked) or attacked.service.bodies.nbytes:
        assert time.monotonic() < end
        time.sleep(0.02)
    assert attacked.service.models["tiny"]._under_way == 0


def head(path: str = "/v1/embeddings", length: int | None = len(BODY), *more: str) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json", *more]
    if length is not None:
        lines.append(f"Content-Length: {length}")
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def connect(served: Served) -> socket.socket:
    return socket.create_connection((served.host, served.port), timeout=20)


def talk(served: Served, *parts: bytes) -> bytes:
    """Send, and read until the server closes or has answered whatever was asked."""
    with connect(served) as connection:
        for part in parts:
            try:
                connection.sendall(part)
            except (BrokenPipeError, ConnectionResetError):
                break
        connection.settimeout(3)
        said = b""
        try:
            while chunk := connection.recv(1 << 16):
                said += chunk
        except (TimeoutError, ConnectionResetError):
            pass
        return said


def read_reply(connection: socket.socket) -> Reply:
    """Read one whole answer, also where the server closes or the connection is reset after it."""
    said = b""
    with contextlib.suppress(ConnectionResetError):
        while chunk := connection.recv(1 << 16):
            said += chunk
            head, end, body = said.partition(b"\r\n\r\n")
            if end and len(body) >= length_of(head):
                break
    return reply_of(said)


def length_of(head: bytes) -> int:
    found = re.search(rb"content-length: (\d+)", head)
    assert found is not None
    return int(found[1])


def reply_of(said: bytes) -> Reply:
    top, _, body = said.partition(b"\r\n\r\n")
    lines = top.decode("latin-1").split("\r\n")
    pairs = (line.partition(": ") for line in lines[1:])
    headers = {name.lower(): value for name, _, value in pairs}
    length = int(headers.get("content-length", len(body)))
    return Reply(int(lines[0].split()[1]), headers, body[:length])


# --- slow and half-open --------------------------------------------------------------------------


def test_a_connection_that_says_nothing_is_closed(attacked: Served) -> None:
    began = time.monotonic()
    assert talk(attacked) == b""
    assert 1 < time.monotonic() - began < 6


def test_a_head_that_comes_byte_by_byte_is_not_waited_for(attacked: Served) -> None:
    with connect(attacked) as connection:
        began = time.monotonic()
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            for byte in head() * 10:
                connection.sendall(bytes([byte]))
                time.sleep(0.05)
        assert time.monotonic() - began < 6


def test_a_second_head_that_comes_slowly_on_one_connection(attacked: Served) -> None:
    with connect(attacked) as connection:
        connection.sendall(head() + BODY)
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200")
        connection.sendall(head()[:40])
        began = time.monotonic()
        try:
            while connection.recv(1 << 16):
                pass
        except ConnectionResetError:
            pass
        assert time.monotonic() - began < 6


def test_a_body_that_comes_slowly_is_a_timeout(attacked: Served) -> None:
    with connect(attacked) as connection:
        connection.sendall(head(length=1000))
        stop = threading.Event()

        def drip() -> None:
            while not stop.wait(0.1):
                try:
                    connection.sendall(b" ")
                except OSError:
                    return

        dripping = threading.Thread(target=drip)
        dripping.start()
        try:
            reply = read_reply(connection)
        finally:
            stop.set()
            dripping.join()
        assert reply.error == (408, "request_timeout", None)
        assert reply.headers["connection"] == "close"


def test_a_body_that_never_ends_its_client_leaving(attacked: Served) -> None:
    with connect(attacked) as connection:
        connection.sendall(head(length=1000) + b"{")
    assert attacked.ask("/v1/embeddings", {"input": "a"}).status == 200


def test_a_stream_that_is_never_read_holds_nothing(attacked: Served) -> None:
    """The answer is made to its end, and the connection cut where nobody reads."""
    with connect(attacked) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        body = json.dumps({**CHAT, "stream": True}).encode()
        connection.sendall(head("/v1/chat/completions", len(body)) + body)
        chats = attacked.service.models["tiny"].chats
        end = time.monotonic() + 20
        while chats._running or chats.waiting:
            assert time.monotonic() < end
            time.sleep(0.02)


def test_large_answers_that_are_never_read_are_cut_off(attacked: Served) -> None:
    documents = [f"{i} {'x' * 7000}" for i in range(140)]
    asked = {"query": "a", "documents": documents, "return_documents": True}
    content = json.dumps(asked).encode()
    with connect(attacked) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(1)
        with contextlib.suppress(TimeoutError, ConnectionError):
            for _ in range(20):
                connection.sendall(head("/v1/rerank", len(content)) + content)
        end = time.monotonic() + 30
        while len(tasks_of(attacked)):
            assert time.monotonic() < end
            time.sleep(0.1)


# --- bodies --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 100_000,
        b'{"input":' * 100_000,
        b'{"input": ' + b"9" * 5000 + b"}",
        b'{"input": NaN}',
        b"\xff\xfe\x00",
        b"{",
        b'{"input": "\\ud800"}',
        b'{"input": "a\\u0000b"}',
        b'{"input": {"__class__": "os"}}',
    ],
)
def test_json_that_is_none(attacked: Served, body: bytes) -> None:
    assert attacked.ask("/v1/embeddings", body=body).error[0] == 400


@pytest.mark.parametrize("extra", [1, MAX_BODY])
def test_a_body_beyond_the_limit(attacked: Served, extra: int) -> None:
    body = b" " * (MAX_BODY + extra)
    assert attacked.ask("/v1/embeddings", body=body).error == (413, "request_too_large", None)


def test_a_body_beyond_the_limit_that_does_not_say_so(attacked: Served) -> None:
    chunk = b"10000\r\n" + b" " * 65536 + b"\r\n"
    said = talk(
        attacked, head(length=None)[:-2] + b"Transfer-Encoding: chunked\r\n\r\n", *[chunk] * 40
    )
    assert reply_of(said).error == (413, "request_too_large", None)


@pytest.mark.parametrize(
    ("path", "content"),
    [
        ("/v1/embeddings", {"modality": "image", "input": "data:;base64,!"}),
        ("/v1/embeddings", {"modality": "image", "input": [data_url(png()[:99])] * 3}),
        ("/v1/embeddings", {"modality": "image", "input": data_url(png()), "mode": "x"}),
        ("/v1/classify", {"images": [data_url(png())], "labels": ["a", "a"]}),
        ("/v1/chat/completions", {"messages": question("", data_url(png()))}),
        ("/v1/chat/completions", {**CHAT, "max_tokens": 10_000}),
    ],
)
def test_what_is_refused_is_forgotten_at_once(attacked: Served, path: str, content: Any) -> None:
    """An error holds the frames that it came through: none of them may hold the error."""
    gc.collect()
    gc.disable()
    try:
        before = kept()  # of other servers in this process
        assert attacked.ask(path, content).error[0] == 400
        end = time.monotonic() + 20
        while any(all(one is not other for other in before) for one in kept()):
            assert time.monotonic() < end
            time.sleep(0.05)
    finally:
        gc.enable()


def kept() -> list[Any]:
    """What is held of requests."""
    return [one for one in gc.get_objects() if type(one) in KEPT and one is not NOTHING]


def test_a_length_that_is_absurd_is_refused_before_it_comes(attacked: Served) -> None:
    said = talk(attacked, head("/v1/embeddings", 10**15, "Expect: 100-continue"))
    assert reply_of(said).error == (413, "request_too_large", None)


def test_bodies_together_have_a_limit(attacked: Served) -> None:
    """Clients that send all but the last byte, and wait."""
    attackers = [connect(attacked) for _ in range(12)]
    try:
        for connection in attackers:
            connection.sendall(head(length=MAX_BODY) + b" " * (MAX_BODY - 1))
        replies = [read_reply(connection) for connection in attackers]
        codes = [reply.error[:2] for reply in replies if reply.body]  # some were cut off
        assert set(codes) <= {(408, "request_timeout"), (429, "queue_full")}
        assert (429, "queue_full") in codes
        assert attacked.service.bodies.nbytes <= 8 * MAX_BODY
    finally:
        for connection in attackers:
            connection.close()


@pytest.mark.parametrize("kind", ["text/plain", "", "application/x-www-form-urlencoded", "json"])
def test_what_is_not_called_json(attacked: Served, kind: str) -> None:
    """A page of another site can send such a request without being asked."""
    reply = attacked.ask("/v1/embeddings", {"input": "a"}, headers={"Content-Type": kind})
    assert reply.error == (415, "unsupported_media_type", None)


def test_json_with_a_charset_is_json(attacked: Served) -> None:
    headers = {"Content-Type": "Application/JSON; charset=utf-8"}
    assert attacked.ask("/v1/embeddings", {"input": "a"}, headers=headers).status == 200


# --- HTTP itself ---------------------------------------------------------------------------------


def test_two_lengths_are_refused_and_end_the_connection(attacked: Served) -> None:
    smuggled = b"0\r\n\r\nGET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n"
    both = head("/v1/embeddings", len(smuggled), "Transfer-Encoding: chunked")
    said = talk(attacked, both + smuggled)
    assert said.count(b"HTTP/1.1 ") == 1
    assert reply_of(said).status == 400


@pytest.mark.parametrize(
    "lines",
    [
        TOP + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n",
        TOP + b"Content-Length: -5\r\n\r\n",
        TOP + b"Content-Length: 5, 5x\r\n\r\n",
        TOP + b"Transfer-Encoding: cow\r\n\r\n",
        TOP + b"A : b\r\n\r\n",
        TOP + b"A: b\x00c\r\n\r\n",
        b"GET http://evil/ HTTP/1.1\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET /" + b"a" * 100_000,
        b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X: y\r\n" * 20_000,
    ],
)
def test_what_is_no_http(attacked: Served, lines: bytes) -> None:
    reply = reply_of(talk(attacked, lines))
    assert reply.error[0] == 400
    assert reply.headers["content-type"] == "application/json"


@pytest.mark.parametrize(("nbytes", "status"), [(65_536, 200), (65_537, 400), (200_000, 400)])
@pytest.mark.parametrize("before", [b"", b"GET /live HTTP/1.1\r\nHost: localhost\r\n\r\n"])
def test_a_head_is_bounded_that_comes_at_once(
    attacked: Served, before: bytes, nbytes: int, status: int
) -> None:
    """One read brings more than the limit, and the whole head."""
    start = b"GET /live HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nX: "
    sent = start + b"x" * (nbytes - len(start) - 4) + b"\r\n\r\n"
    answers = talk(attacked, before + sent).split(b"HTTP/1.1 ")[1:]
    assert [int(answer[:3]) for answer in answers] == [200] * bool(before) + [status]


@pytest.mark.parametrize("line", [b"GET /live HTTP/9.9\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\n"])
def test_versions_that_are_not_spoken(attacked: Served, line: bytes) -> None:
    assert reply_of(talk(attacked, line)).status in (200, 400, 404)


def test_a_request_within_an_unread_body_is_not_a_request(attacked: Served) -> None:
    inner = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n"
    for path in ("/v1/models", "/nowhere", "/v1/embeddings"):
        kind = "Content-Type: text/plain"
        lines = f"POST {path} HTTP/1.1\r\nHost: localhost\r\n{kind}\r\nContent-Length: {len(inner)}"
        said = talk(attacked, lines.encode() + b"\r\n\r\n" + inner)
        assert said.count(b"HTTP/1.1 ") == 1
        assert reply_of(said).headers["connection"] == "close"


def test_requests_in_a_row_are_answered_in_a_row(attacked: Served) -> None:
    said = talk(
        attacked,
        (head() + BODY) * 5 + head("/v1/embeddings", len(BODY), "Connection: close") + BODY,
    )
    assert said.count(b"HTTP/1.1 200") == 6


def test_no_header_of_a_client_comes_back(attacked: Served) -> None:
    headers = {
        "X-Request-Id": "evil",
        "Origin": "https://evil.example",
        "X-Forwarded-For": "evil",
        "X-Forwarded-Host": "evil",
        "Cookie": "evil=1",
    }
    reply = attacked.ask("/v1/embeddings", {"input": "a"}, headers=headers)
    assert reply.status == 200
    assert "evil" not in str(reply.headers)
    assert "access-control-allow-origin" not in {name.lower() for name in reply.headers}
    assert reply.headers["cross-origin-resource-policy"] == "same-origin"
    assert len(reply.headers["x-request-id"]) == 32


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "10.0.0.1"]
)
def test_a_name_that_was_pointed_here_is_refused(attacked: Served, host: str) -> None:
    """DNS rebinding: a page of the web whose name is made to mean this machine."""
    reply = attacked.ask("/v1/models", headers={"Host": host})
    assert reply.error == (421, "host_not_allowed", None)


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:1", "[::1]:8", "127.0.0.1", "a.localhost:5"]
)
def test_this_machines_own_names_are_fine(attacked: Served, host: str) -> None:
    assert attacked.ask("/v1/models", headers={"Host": host}).status == 200


@pytest.mark.parametrize(
    "name",
    [
        "\u202etiny",
        "tiny\u0000",
        "ＴＩＮＹ",
        "t\u0456ny",
        "../tiny",
        "tiny\r\nX-Evil: 1",
        "\ud800",
        "x" * 100_000,
        "🙂",
    ],
)
def test_names_of_models_that_are_none(attacked: Served, name: str) -> None:
    reply = attacked.ask("/v1/embeddings", {"input": "a", "model": name})
    assert reply.error == (404, "model_not_found", "model")
    assert reply.body.isascii()
    assert len(reply.body) < 400
    assert "x-evil" not in {key.lower() for key in reply.headers}


@pytest.mark.parametrize(
    "path",
    [
        "/../../etc/passwd",
        "/%2e%2e/%2e%2e/etc/passwd",
        "//etc/passwd",
        "/page.js/",
        "/v1/models/%00",
        "/%ff",
    ],
)
def test_paths_that_lead_nowhere(attacked: Served, path: str) -> None:
    assert attacked.ask(path).error[0] == 404


def test_methods_that_no_route_has(attacked: Served) -> None:
    for method in ("PUT", "DELETE", "PATCH", "TRACE", "CONNECTX"):
        reply = attacked.ask("/v1/embeddings", method=method)
        assert reply.error == (405, "method_not_allowed", None)
        assert reply.headers["allow"] == "POST"


# --- pictures ------------------------------------------------------------------------------------


def chunk_of(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_of(width: int, height: int, *more: bytes, data: bytes = b"") -> bytes:
    top = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    magic = b"\x89PNG\r\n\x1a\n"
    parts = [chunk_of(b"IHDR", top), *more, chunk_of(b"IDAT", zlib.compress(data))]
    return magic + b"".join(parts) + chunk_of(b"IEND", b"")


def webp_of(width: int, height: int) -> bytes:
    """The head of an extended WebP of this size, and nothing in it."""
    top = bytes(4) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    body = b"WEBPVP8X" + struct.pack("<I", 10) + top
    return b"RIFF" + struct.pack("<I", len(body)) + body


@pytest.mark.parametrize(
    "picture",
    [
        png_of(20_000, 20_000),
        png_of(2**31 - 1, 2**31 - 1),
        png_of(0, 5),
        webp_of(16_384, 16_384),
        b"\xff\xd8\xff\xe0" + b"\xff\xc0\x00\x11\x08\xff\xff\xff\xff\x03" + bytes(30),
        b"GIF89a" + bytes(100),
        b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
        b"%PDF-1.7",
        b"\x89PNG\r\n\x1a\n",
    ],
)
def test_pictures_that_are_bombs_or_none(attacked: Served, picture: bytes) -> None:
    began = time.monotonic()
    content = {"input": data_url(picture), "modality": "image"}
    assert attacked.ask("/v1/embeddings", content).error == (400, "invalid_image", "input")
    asked = {"messages": question("what?", data_url(picture))}
    assert attacked.ask("/v1/chat/completions", asked).error[0] == 400
    assert time.monotonic() - began < 10


@pytest.mark.parametrize(
    "more", [chunk_of(b"zTXt", b"a\0\0" + zlib.compress(bytes(50 << 20))), b""]
)
def test_what_comes_with_the_pixels_is_not_unpacked(attacked: Served, more: bytes) -> None:
    picture = png_of(16, 16, more, data=bytes(60 << 20))
    content = {"input": data_url(picture), "modality": "image"}
    began = time.monotonic()
    assert attacked.ask("/v1/embeddings", content).status == 200
    assert time.monotonic() - began < 3


# --- many ----------------------------------------------------------------------------------------


def test_a_thousand_connections(attacked: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "HEAD_S", 60.0)
    server._allow_connections()
    connections = []
    try:
        for i in range(1000):
            connections.append(connect(attacked))
            if i % 3 == 0:
                connections[-1].sendall(head()[: i % 100])
        assert attacked.ask("/v1/embeddings", {"input": "a"}).status == 200
        assert attacked.ask("/health").status == 200
    finally:
        for connection in connections:
            connection.close()


def test_more_connections_than_are_taken(attacked: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "MAX_CONNECTIONS", 20)
    connections: list[Any] = [connect(attacked) for _ in range(30)]
    connections[-1].settimeout(5)
    with contextlib.suppress(ConnectionResetError):
        assert connections[-1].recv(1) == b""
    for connection in connections:
        connection.close()
    end = time.monotonic() + 10
    while time.monotonic() < end:
        try:
            if attacked.ask("/live").status == 200:
                return
        except OSError:
            time.sleep(0.1)
    pytest.fail("no connection is taken any more")

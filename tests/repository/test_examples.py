"""Every Python example, run as its first lines say, on a directory compiled from a checkpoint."""

from __future__ import annotations

import hashlib
import json
import shutil
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.checkpoints import write_internvl, write_tokenizer
from support.paths import ROOT

import internvl_edge
from internvl_edge.compiler import ExportOptions, export
from internvl_edge.errors import FeedError, HardwareError, MediaError, ResourceError, SessionDead

sys.path.insert(0, str(ROOT / "examples"))
from threaded_server import Server

EXAMPLES = ROOT / "examples"
NUM_PICTURES = 6


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``out`` and pictures beside it."""
    root = tmp_path_factory.mktemp("examples")
    checkpoint = write_internvl(root / "checkpoint")
    write_tokenizer(checkpoint.path)
    export(
        ExportOptions(
            checkpoint=checkpoint.path,
            out=root / "out",
            precision="fp32",
            components=("image_embed", "text_embed"),
            verify="none",
        )
    )
    export(
        ExportOptions(
            checkpoint=checkpoint.path,
            out=root / "levels",
            precision="fp32",
            components=("image_embed",),
            input="uint8",
            verify="none",
        )
    )
    for i in range(NUM_PICTURES):
        levels = np.random.default_rng(i).integers(0, 256, (40, 30, 3), np.uint8)
        Image.fromarray(levels).save(root / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def wanted(place: Path) -> Any:
    with internvl_edge.load(place / "out") as model:
        return model.encode_image([place / f"{i}.png" for i in range(NUM_PICTURES)])


@contextmanager
def running(name: str, out: Path) -> Iterator[int]:
    """A server; the port that it listens on."""
    command = [sys.executable, str(EXAMPLES / name), str(out), "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            yield int(server.stdout.readline().removeprefix("listening on "))
        finally:
            server.terminate()


@pytest.mark.slow
def test_the_application(place: Path) -> None:
    pictures = [str(place / f"{i}.png") for i in range(2)]
    command = [sys.executable, str(EXAMPLES / "embed_app.py"), str(place / "out"), "a b"]
    done = subprocess.run([*command, *pictures], capture_output=True, text=True, check=True)
    lines = [line.split("  ", 1) for line in done.stdout.splitlines()]
    assert [path for _, path in lines] == pictures
    with internvl_edge.load(place / "out") as model:
        images = model.encode_image(pictures, normalize=True)
        texts = model.encode_text(["a b"], normalize=True)
    np.testing.assert_allclose(
        [float(similarity) for similarity, _ in lines], images @ texts[0], atol=1e-4
    )
    source = (EXAMPLES / "embed_app.py").read_text(encoding="utf-8")
    assert len([line for line in source.split('"""')[2].splitlines() if line]) <= 20


@pytest.mark.parametrize("name", ["embed_app.py", "threaded_server.py", "asyncio_server.py"])
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "usage: NAME OUT "),
        (["--help"], "usage: NAME OUT "),
        (["nowhere", "1", "2", "3"], "usage: "),
        (["nowhere", "1"], "error: nowhere: expected a directory written by internvl-edge export"),
    ],
)
def test_what_an_example_cannot_do_is_said(name: str, arguments: list[str], said: str) -> None:
    if name == "embed_app.py" and len(arguments) > 1:
        arguments, said = ["nowhere", "a", "0.png"], "error: nowhere: expected a directory"
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(said.replace("NAME", name))
    assert len(done.stderr.splitlines()) == 1


def post(port: int, body: bytes) -> tuple[int, dict[str, Any]]:
    request = urllib.request.Request(f"http://127.0.0.1:{port}", data=body)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


@pytest.mark.slow
def test_the_threaded_server(place: Path, wanted: Any) -> None:
    """Many callers at once get what each asked for, and a bad one its own error."""
    bodies = [(place / f"{i % NUM_PICTURES}.png").read_bytes() for i in range(20)]
    with running("threaded_server.py", place / "out") as port, ThreadPoolExecutor(10) as pool:
        answers = list(pool.map(lambda body: post(port, body), [*bodies, b"no picture", b""]))
    for i, (status, answer) in enumerate(answers[:20]):
        assert status == 200
        np.testing.assert_allclose(answer["embedding"], wanted[i % NUM_PICTURES], atol=1e-4)
    assert answers[20][0] == 400
    assert "picture" in answers[20][1]["error"] or "image" in answers[20][1]["error"]
    assert answers[21][0] == 413


def converse(port: int, lines: list[str]) -> list[dict[str, Any]]:
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall("".join(f"{line}\n" for line in lines).encode())
        connection.shutdown(socket.SHUT_WR)
        with connection.makefile() as answers:
            return [json.loads(line) for line in answers]


def test_the_asyncio_server(place: Path, wanted: Any) -> None:
    """Connections side by side, each answered in its order; an error ends nothing."""
    orders = [[(i + start) % NUM_PICTURES for i in range(5)] for start in range(4)]
    asked = [[str(place / f"{i}.png") for i in order] + ["missing.png"] for order in orders]
    with running("asyncio_server.py", place / "out") as port, ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda lines: converse(port, lines), asked))
    for order, found in zip(orders, answers, strict=True):
        embeddings = [answer["embedding"] for answer in found[:-1]]
        np.testing.assert_allclose(embeddings, wanted[order], atol=1e-4)
        assert "missing.png" in found[-1]["error"]


@pytest.mark.parametrize("name", ["threaded_server.py", "asyncio_server.py"])
def test_servers_of_a_directory_that_normalises_itself(place: Path, wanted: Any, name: str) -> None:
    path = place / "0.png"
    with running(name, place / "levels") as port:
        if name == "asyncio_server.py":
            (answer,) = converse(port, [str(path)])
        else:
            _, answer = post(port, path.read_bytes())
    np.testing.assert_allclose(answer["embedding"], wanted[0], atol=1e-3)


def test_what_the_asyncio_server_cannot_read_ends_nothing(place: Path) -> None:
    """Lines beyond its limit, in one piece or in many, a zero in a path; the next is answered."""
    picture = str(place / "0.png")
    lines = ["x" * 5000, picture, "y" * 300_000, picture, "a\0b", picture, "z" * 100_000]
    with running("asyncio_server.py", place / "out") as port:
        found = converse(port, lines)
    assert ["error" in answer for answer in found] == [True, False] * 3 + [True]
    assert "at most 4096 bytes" in found[0]["error"]
    assert "null" in found[4]["error"]


class Broken:
    """A batcher whose requests fail."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def run(self, feeds: Any) -> Any:
        raise self.error

    def submit(self, feeds: Any) -> Any:
        future: Future[Any] = Future()
        future.set_exception(self.error)
        return future


@pytest.mark.parametrize(
    ("error", "status", "stops"),
    [
        (SessionDead("gone"), 500, True),
        (HardwareError("refused"), 500, False),
        (ResourceError("full"), 503, False),
        (MediaError("no picture"), 400, False),
    ],
)
def test_whose_an_error_is(error: Exception, status: int, stops: bool) -> None:
    with Server(("127.0.0.1", 0), Broken(error), lambda body: body) as server:  # type: ignore[arg-type]
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        port = int(server.server_address[1])
        assert post(port, b"picture") == (status, {"error": str(error)})
        if not stops:
            server.shutdown()
        thread.join(5)
        assert not thread.is_alive()
        assert server.is_dead == stops


def test_a_length_that_is_no_number_is_refused() -> None:
    with Server(("127.0.0.1", 0), Broken(FeedError("not reached")), lambda body: body) as server:  # type: ignore[arg-type]
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        with socket.create_connection(server.server_address[:2], timeout=5) as connection:  # type: ignore[arg-type]
            connection.sendall(b"POST / HTTP/1.0\r\nContent-Length: -1x\r\n\r\n")
            assert b" 413 " in connection.recv(100)
        server.shutdown()
        thread.join(5)


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_the_hash_of_the_cpp_example(tmp_path: Path) -> None:
    """Lengths around the ends of its blocks of 64 bytes."""
    source = tmp_path / "main.cpp"
    source.write_text(
        '#include "sha256.hpp"\n#include <iostream>\n#include <sstream>\n'
        "int main() { std::ostringstream all; all << std::cin.rdbuf();\n"
        "  std::string bytes = all.str();\n"
        "  for (size_t n : {0, 1, 55, 56, 63, 64, 65, 119, 120, 1000})\n"
        '    std::cout << sha256(bytes.substr(0, n)) << "\\n"; }\n',
        encoding="utf-8",
    )
    program = str(tmp_path / "main")
    compiler = ["g++", "-std=c++17", "-Wall", "-Wextra", "-Werror", f"-I{EXAMPLES}"]
    subprocess.run([*compiler, str(source), "-o", program], check=True)
    data = np.random.default_rng(0).bytes(1000)
    done = subprocess.run([program], input=data, capture_output=True, check=True)
    lengths = (0, 1, 55, 56, 63, 64, 65, 119, 120, 1000)
    assert done.stdout.decode().split() == [hashlib.sha256(data[:n]).hexdigest() for n in lengths]

"""A server with a thread per connection, whose requests share batches.

    python examples/threaded_server.py OUT 8080 &
    curl --data-binary @photo.jpg localhost:8080

Each thread decodes its own picture; the batcher's one thread runs the model. A full queue is
answered at once (503), so that callers can go elsewhere; a body that is no picture is the caller's
fault (400), and anything else is ours (500). After a fault of the GPU that only a new process
recovers from, the server stops.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

from internvl_edge.artifact import open_artifact
from internvl_edge.errors import InternVLError, MediaError, ResourceError, SessionDead
from internvl_edge.runtime.batching import Batcher
from internvl_edge.runtime.images.transform import Preprocessing, pixel_levels, pixel_values
from internvl_edge.runtime.session import open_component

MAX_NBYTES = 20_000_000  # of a picture


class Server(ThreadingHTTPServer):
    """Its requests' threads see the model through it."""

    def __init__(
        self, address: tuple[str, int], batcher: Batcher, prepare: Callable[[bytes], Any]
    ) -> None:
        super().__init__(address, Handler)
        self.batcher, self.prepare = batcher, prepare
        self.is_dead = False


class Handler(BaseHTTPRequestHandler):
    """POST a picture, get its embedding."""

    server: Server

    def do_POST(self) -> None:
        """Answer one picture."""
        told = self.headers.get("Content-Length", "")
        length = int(told) if told.isdecimal() else 0
        if not 0 < length <= MAX_NBYTES:
            return self.answer(413, {"error": f"expected 1 to {MAX_NBYTES} bytes"})
        try:
            pixels = self.server.prepare(self.rfile.read(length))
            found = self.server.batcher.run({"pixel_values": pixels})
        except MediaError as error:
            return self.answer(400, {"error": str(error)})
        except ResourceError as error:
            return self.answer(503, {"error": str(error)})
        except InternVLError as error:
            self.answer(500, {"error": str(error)})
            if isinstance(error, SessionDead):
                self.server.is_dead = True
                Thread(target=self.server.shutdown).start()  # it waits for the server's loop
            return None
        return self.answer(200, {"embedding": found["image_embeds"][0].tolist()})

    def answer(self, status: int, content: dict[str, object]) -> None:
        """Send JSON."""
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Stay silent."""


def main(out: str, port: str) -> None:
    artifact = open_artifact(out)
    preprocessing = Preprocessing.from_json(artifact.manifest.preprocessing)
    with (
        open_component(artifact, "image_embed") as session,
        Batcher(session, max_batch=8, max_delay_ms=2, max_queued=64) as batcher,
    ):
        as_levels = session.inputs["pixel_values"].dtype == "uint8"  # export --input uint8
        prepare = partial(pixel_levels if as_levels else pixel_values, preprocessing=preprocessing)
        with Server(("127.0.0.1", int(port)), batcher, prepare) as server:
            sys.stdout.write(f"listening on {server.server_address[1]}\n")
            sys.stdout.flush()
            server.serve_forever()
        sys.exit(server.is_dead)


if __name__ == "__main__":
    if len(sys.argv) != 3 or not sys.argv[2].isdecimal():
        sys.exit("usage: threaded_server.py OUT PORT")
    try:
        main(*sys.argv[1:])
    except InternVLError as error:
        sys.exit(f"error: {error}")

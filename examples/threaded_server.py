"""A server with a thread per connection, whose requests share batches.

    python examples/threaded_server.py OUT 8080 &
    curl --data-binary @photo.jpg localhost:8080

Each thread decodes its own picture; the batcher's one thread runs the model. A full queue is
answered at once (503), so that callers can go elsewhere; a picture that is none is theirs (400).
"""

from __future__ import annotations

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from internvl_edge.artifact import open_artifact
from internvl_edge.errors import InternVLError, ResourceError
from internvl_edge.runtime.batching import Batcher
from internvl_edge.runtime.image import Preprocessing, pixel_values
from internvl_edge.runtime.session import open_component

MAX_NBYTES = 20_000_000  # of a picture


class Server(ThreadingHTTPServer):
    """Its requests' threads see the model through it."""

    def __init__(self, address: tuple[str, int], batcher: Batcher, prepare: Preprocessing) -> None:
        super().__init__(address, Handler)
        self.batcher, self.prepare = batcher, prepare


class Handler(BaseHTTPRequestHandler):
    """POST a picture, get its embedding."""

    server: Server

    def do_POST(self) -> None:
        """Answer one picture."""
        length = int(self.headers.get("Content-Length", 0))
        if not 0 < length <= MAX_NBYTES:
            return self.answer(413, {"error": f"expected 1 to {MAX_NBYTES} bytes"})
        try:
            pixels = pixel_values(self.rfile.read(length), self.server.prepare)
            found = self.server.batcher.run({"pixel_values": pixels})
        except ResourceError as error:
            return self.answer(503, {"error": str(error)})
        except InternVLError as error:
            return self.answer(400, {"error": str(error)})
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
    prepare = Preprocessing.from_json(artifact.manifest.preprocessing)
    with (
        open_component(artifact, "image_embed") as session,
        Batcher(session, max_batch=8, max_delay_ms=2, max_queued=64) as batcher,
        Server(("127.0.0.1", int(port)), batcher, prepare) as server,
    ):
        sys.stdout.write(f"listening on {server.server_address[1]}\n")
        sys.stdout.flush()
        server.serve_forever()


if __name__ == "__main__":
    main(*sys.argv[1:])

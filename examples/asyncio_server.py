"""The same model behind an event loop: one request a line, answers in the order of requests.

    python examples/asyncio_server.py OUT 8081 &
    echo photo.jpg | nc -N localhost 8081

The loop never waits for a picture or for the model: pictures are decoded in a pool of threads, and
the batcher's future is awaited. ``Batcher.submit`` is what joins requests of all connections.
"""

from __future__ import annotations

import asyncio
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from internvl_edge.artifact import open_artifact
from internvl_edge.errors import InternVLError
from internvl_edge.runtime.batching import Batcher
from internvl_edge.runtime.image import Preprocessing, pixel_values
from internvl_edge.runtime.session import open_component


async def embed(
    path: str, batcher: Batcher, prepare: Preprocessing, pool: ThreadPoolExecutor
) -> list[float]:
    """The embedding of a picture."""
    loop = asyncio.get_running_loop()
    pixels = await loop.run_in_executor(pool, pixel_values, path, prepare)
    found = await asyncio.wrap_future(batcher.submit({"pixel_values": pixels}))
    embedding: list[float] = found["image_embeds"][0].tolist()
    return embedding


async def converse(
    batcher: Batcher,
    prepare: Preprocessing,
    pool: ThreadPoolExecutor,
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
) -> None:
    """A connection: a path on each line, a JSON object for each."""
    while line := await reader.readline():
        answer: dict[str, object]
        try:
            answer = {"embedding": await embed(line.decode().strip(), batcher, prepare, pool)}
        except (InternVLError, UnicodeDecodeError) as error:
            answer = {"error": str(error)}
        writer.write(json.dumps(answer).encode() + b"\n")
        await writer.drain()
    writer.close()


async def serve(out: str, port: int) -> None:
    artifact = open_artifact(out)
    prepare = Preprocessing.from_json(artifact.manifest.preprocessing)
    with (
        open_component(artifact, "image_embed") as session,
        Batcher(session, max_batch=8, max_delay_ms=2) as batcher,
        ThreadPoolExecutor(4, "decode") as pool,
    ):
        connected = partial(converse, batcher, prepare, pool)
        server = await asyncio.start_server(connected, "127.0.0.1", port)
        sys.stdout.write(f"listening on {server.sockets[0].getsockname()[1]}\n")
        sys.stdout.flush()
        async with server:
            await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1], int(sys.argv[2])))

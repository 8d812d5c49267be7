"""A server on an event loop: one request a line, answers in the order of the requests.

    python examples/asyncio_server.py OUT 8081 &
    echo photo.jpg | nc -N localhost 8081

The loop never waits for a picture or for the model: pictures are decoded in a pool of threads, and
the batcher's future is awaited. ``Batcher.submit`` joins the requests of all connections. After a
fault of the GPU that only a new process recovers from, the server stops.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from internvl_edge.artifact import open_artifact
from internvl_edge.errors import InternVLError, SessionDead
from internvl_edge.runtime.batching import Batcher
from internvl_edge.runtime.images.transform import Preprocessing, pixel_levels, pixel_values
from internvl_edge.runtime.session import open_component

MAX_LINE_NBYTES = 4096

Prepare = Callable[[str], Any]


async def embed(
    path: str, batcher: Batcher, prepare: Prepare, pool: ThreadPoolExecutor
) -> list[float]:
    """Embed a picture."""
    loop = asyncio.get_running_loop()
    pixels = await loop.run_in_executor(pool, prepare, path)
    found = await asyncio.wrap_future(batcher.submit({"pixel_values": pixels}))
    embedding: list[float] = found["image_embeds"][0].tolist()
    return embedding


async def next_line(reader: asyncio.StreamReader) -> tuple[bytes, bool]:
    """Read to the end of the next line, and tell whether it fitted: what is too long is skipped."""
    is_whole = True
    while True:
        try:
            return await reader.readuntil(), is_whole
        except asyncio.LimitOverrunError as overrun:
            await reader.readexactly(overrun.consumed)
            is_whole = False
        except asyncio.IncompleteReadError as end:
            return end.partial, is_whole


async def converse(
    batcher: Batcher,
    prepare: Prepare,
    pool: ThreadPoolExecutor,
    dead: asyncio.Event,
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
) -> None:
    """Serve a connection: a path on each line, a JSON object for each."""
    try:
        while (found := await next_line(reader)) != (b"", True):
            line, is_whole = found
            answer: dict[str, object] = {"error": f"a line has at most {MAX_LINE_NBYTES} bytes"}
            try:
                if is_whole:
                    path = line.decode().strip()
                    answer = {"embedding": await embed(path, batcher, prepare, pool)}
            except (InternVLError, ValueError) as error:  # a path that is no text, or has a zero
                answer = {"error": str(error)}
                if isinstance(error, SessionDead):
                    dead.set()
            writer.write(json.dumps(answer).encode() + b"\n")
            await writer.drain()
    except ConnectionError:
        pass  # the caller left
    finally:
        writer.close()


async def serve(out: str, port: int) -> None:
    """Serve until the GPU fails for good."""
    artifact = open_artifact(out)
    preprocessing = Preprocessing.from_json(artifact.manifest.preprocessing)
    with (
        open_component(artifact, "image_embed") as session,
        Batcher(session, max_batch=8, max_delay_ms=2) as batcher,
        ThreadPoolExecutor(4, "decode") as pool,
    ):
        as_levels = session.inputs["pixel_values"].dtype == "uint8"  # export --input uint8
        prepare = partial(pixel_levels if as_levels else pixel_values, preprocessing=preprocessing)
        dead = asyncio.Event()
        connected = partial(converse, batcher, prepare, pool, dead)
        server = await asyncio.start_server(connected, "127.0.0.1", port, limit=MAX_LINE_NBYTES)
        sys.stdout.write(f"listening on {server.sockets[0].getsockname()[1]}\n")
        sys.stdout.flush()
        await dead.wait()
        server.close()


if __name__ == "__main__":
    if len(sys.argv) != 3 or not sys.argv[2].isdecimal():
        sys.exit("usage: asyncio_server.py OUT PORT")
    try:
        asyncio.run(serve(sys.argv[1], int(sys.argv[2])))
    except InternVLError as error:
        sys.exit(f"error: {error}")
    sys.exit(1)

"""The cost of the HTTP server, and its answers under load: ``make bench-serve``.

    python benchmarks/serve.py OUT [--clients 64] [--seconds 60] [--json FILE]

*Overhead*: one client in turns with the runtime in this process, on the same picture; the medians
and their difference. *Load*: so many connections, each asking again as soon as it is answered, for
pictures and texts of which every answer is compared with the runtime's; requests per second,
latencies, refusals, and the server's memory every second. The generator is this file: AIPerf asks
the same routes and weighs 1.2 GB.

On a machine that others use too, compare numbers of one run only.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import http.client
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import internvl_edge
from internvl_edge.benchmark.machine import environment
from internvl_edge.runtime.model import Model

HEADERS = {"content-type": "application/json"}
NUM_INPUTS = 16
CLOSE = 1e-4  # of unit vectors: INT8 on a CPU depends on its batch in the last digits
MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Asked:
    """A request, and the vector that is right."""

    body: bytes
    vector: Any


@dataclass(slots=True)
class Seen:
    """The answers that clients got, counted."""

    seconds: list[float] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)
    wrong: int = 0
    furthest: float = 0.0


def inputs(model: Model) -> list[Asked]:
    """Draw pictures and texts, and compute what is right."""
    found = []
    for i in range(NUM_INPUTS):
        levels = np.random.default_rng(i).integers(0, 256, (96, 96, 3), np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(levels).save(buffer, "JPEG")
        picture, text = buffer.getvalue(), f"a photo of {i} things"
        url = "data:image/jpeg;base64," + base64.b64encode(picture).decode()
        for content, vector in (
            ({"input": url, "modality": "image"}, model.encode_image(picture, normalize=True)[0]),
            ({"input": text}, model.encode_text(text, normalize=True)[0]),
        ):
            body = json.dumps({**content, "encoding_format": "base64"}).encode()
            found.append(Asked(body, vector))
    return found


def vector_of(answer: bytes) -> Any:
    spelled = json.loads(answer)["data"][0]["embedding"]
    return np.frombuffer(base64.b64decode(spelled), "<f4")


def overhead(port: int, model: Model, asked: Asked, rounds: int) -> dict[str, Any]:
    """Ask the server and the runtime in turns."""
    url = json.loads(asked.body)["input"]
    picture = base64.b64decode(url.partition(",")[2])
    connection = http.client.HTTPConnection("127.0.0.1", port)
    served, direct = [], []
    for _ in range(rounds):
        began = time.perf_counter()
        connection.request("POST", "/v1/embeddings", asked.body, HEADERS)
        connection.getresponse().read()
        served.append(time.perf_counter() - began)
        began = time.perf_counter()
        model.encode_image(picture, normalize=True)
        direct.append(time.perf_counter() - began)
    connection.close()
    rows = {
        name: dict(zip(("p10", "p50", "p90"), percentiles(times, 10, 50, 90), strict=True))
        for name, times in (("served_ms", served), ("direct_ms", direct))
    }
    added = {key: rows["served_ms"][key] - rows["direct_ms"][key] for key in ("p10", "p50")}
    return {**rows, "overhead_ms": added, "rounds": rounds}


async def ask(port: int, asked: Asked, streams: Any) -> tuple[int, bytes]:
    """Send one request on a connection."""
    reader, writer = streams
    head = f"POST /v1/embeddings HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(asked.body)}\r\n\r\n"
    writer.write(head.encode() + asked.body)
    await writer.drain()
    lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower().split("\r\n")
    length = next(int(line[15:]) for line in lines if line.startswith("content-length:"))
    return int(lines[0].split()[1]), await reader.readexactly(length)


async def client(port: int, inputs: list[Asked], first: int, end: float, seen: Seen) -> None:
    """Ask again and again, and compare."""
    streams = await asyncio.open_connection("127.0.0.1", port)
    at = first
    while time.perf_counter() < end:
        asked, at = inputs[at % len(inputs)], at + 1
        began = time.perf_counter()
        status, body = await ask(port, asked, streams)
        seen.seconds.append(time.perf_counter() - began)
        seen.statuses[status] += 1
        if status == 200:
            distance = float(np.abs(vector_of(body) - asked.vector).max())
            seen.furthest = max(seen.furthest, distance)
            seen.wrong += distance > CLOSE
        else:
            await asyncio.sleep(0.05)
    streams[1].close()


async def load(
    port: int, pid: int, inputs: list[Asked], clients: int, seconds: float
) -> dict[str, Any]:
    """Ask with many clients at once."""
    seen, end, resident = Seen(), time.perf_counter() + seconds, list[float]()

    async def watch() -> None:
        while time.perf_counter() < end:
            resident.append(rss(pid))
            await asyncio.sleep(1)

    await asyncio.gather(watch(), *(client(port, inputs, i, end, seen) for i in range(clients)))
    quarter = max(1, len(resident) // 4)
    p50, p90, p99 = percentiles(seen.seconds, 50, 90, 99)
    return {
        "clients": clients,
        "seconds": seconds,
        "requests_per_s": round(len(seen.seconds) / seconds, 1),
        "statuses": dict(seen.statuses),
        "wrong": seen.wrong,
        "furthest": seen.furthest,
        "p50_ms": p50,
        "p90_ms": p90,
        "p99_ms": p99,
        "rss_mib": {
            "first_quarter": round(float(np.mean(resident[:quarter])), 1),
            "last_quarter": round(float(np.mean(resident[-quarter:])), 1),
            "most": round(max(resident), 1),
        },
    }


def rss(pid: int) -> float:
    """Read how much memory a process has, MiB."""
    pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / MIB


def percentiles(seconds: list[float], *which: int) -> list[float]:
    return [round(float(value) * 1e3, 2) for value in np.percentile(seconds, which)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--rounds", type=int, default=500)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    command = [sys.executable, "-m", "internvl_edge", "serve", f"model={given.out}"]
    command += ["--port", "0", "--threads", "1", "--drain", "0", "--json"]
    options = internvl_edge.OrtOptions(num_threads=1)
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server,
        internvl_edge.load(given.out, options=options) as model,
    ):
        assert server.stdout is not None
        port = int(json.loads(server.stdout.readline())["url"].rpartition(":")[2])
        asked = inputs(model)
        try:
            overhead(port, model, asked[0], 50)  # warm up
            found: dict[str, Any] = {
                "command": f"python benchmarks/serve.py OUT --clients {given.clients} "
                f"--seconds {given.seconds:g} --rounds {given.rounds}",
                "environment": environment(),
                "precision": model.artifact.manifest.precision,
                "load_average": os.getloadavg(),
                "overhead": overhead(port, model, asked[0], given.rounds),
                "load": asyncio.run(load(port, server.pid, asked, given.clients, given.seconds)),
            }
        finally:
            server.send_signal(signal.SIGTERM)
        found["exit_code"] = server.wait()
    text = json.dumps(found, indent=1)
    sys.stdout.write(text + "\n")
    if given.json is not None:
        given.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

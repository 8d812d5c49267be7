"""Pictures per second of `embed SOURCE OUT -o DEST`, compared with the bare session.

    python benchmarks/bulk.py OUT [--pictures 2000] [--rounds 5] [--json FILE]

Scenes of the demo's held-out digits, as PNGs of the model's own size and as JPEGs of 240 by 240,
are embedded in turns by

    session      the session alone with every core, on prepared pixel_values, at its best batch
    pool         the same with a thread for each core and one core for each call
    encode_image `Model.encode_image` of the files: decode, then compute, in turns
    bulk         the whole command: list, decode, compute, write Parquet, sync, rename

The session's calls are interleaved with the others, round by round, and the medians are compared:
the target is bulk at 90 % of the session. CPU is the processor's time for a picture, the least of
the rounds: on a machine that others use too it says more than the clock. The session's includes
threads that wait in a loop, the pool's does not.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import internvl_edge
from internvl_edge.artifact.components import IMAGE_EMBED
from internvl_edge.benchmark.machine import environment
from internvl_edge.demo.scenes import scene
from internvl_edge.files.cores import usable_cores
from internvl_edge.integrations.bulk.run import embed
from internvl_edge.integrations.bulk.sources.opening import open_source
from internvl_edge.runtime.images.transform import pixel_values
from internvl_edge.runtime.session import Session
from internvl_edge.types import Array

BATCHES = (1, 8, 32)
JPEG_SIDE = 240
BULK_BATCH = 32  # of ``bulk`` at this size


def write_pictures(folder: Path, count: int) -> dict[str, Path]:
    """Draw scenes; each as a PNG of its own size, and as a larger JPEG."""
    places = {"PNG 48": folder / "png", f"JPEG {JPEG_SIDE}": folder / "jpeg"}
    for place in places.values():
        place.mkdir()
    for i in range(count):
        picture = Image.fromarray(scene("held-out", 7, i).image)
        picture.save(folder / "png" / f"{i:05d}.png")
        large = picture.resize((JPEG_SIDE, JPEG_SIDE), Image.Resampling.BICUBIC)
        large.save(folder / "jpeg" / f"{i:05d}.jpg", quality=90)
    return places


def alone(session: Session, pixels: Array, batch: int) -> None:
    """Run a session on every picture, a batch at a time."""
    for start in range(0, len(pixels), batch):
        session.run({"pixel_values": pixels[start : start + batch]}, check=False)


def in_threads(session: Session, pixels: Array, batch: int, threads: int) -> None:
    """Run a session on every picture, with as many batches at once as there are threads."""
    starts = range(0, len(pixels), batch)
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda at: alone(session, pixels[at : at + batch], batch), starts))


def best_batch(session: Session, pixels: Array) -> int:
    """Find the batch with which a session is fastest."""

    def seconds(batch: int) -> float:
        began = time.perf_counter()
        alone(session, pixels[:256], batch)
        return time.perf_counter() - began

    return min(BATCHES, key=lambda batch: min(seconds(batch) for _ in range(3)))


def in_turns(
    contenders: dict[str, Callable[[], Any]], count: int, rounds: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Return each contender's median pictures per second, and its least CPU ms per picture."""
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    cpu_ms: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            began, computed = time.perf_counter(), time.process_time()
            run()
            rates[name].append(count / (time.perf_counter() - began))
            cpu_ms[name].append(1e3 * (time.process_time() - computed) / count)
    return (
        {name: statistics.median(values) for name, values in rates.items()},
        {name: min(values) for name, values in cpu_ms.items()},
    )


def measure(out: Path, place: Path, dest: Path, rounds: int) -> dict[str, Any]:
    """Compare the contenders on one folder."""
    paths = sorted(place.iterdir())
    cores = usable_cores()
    one = internvl_edge.OrtOptions(num_threads=1)
    with internvl_edge.load(out) as whole, internvl_edge.load(out, options=one) as single:
        pixels = np.concatenate(
            [
                pixel_values([str(path) for path in paths[i : i + 64]], whole.preprocessing)
                for i in range(0, len(paths), 64)
            ]
        )
        session = whole.session(IMAGE_EMBED)
        batch = best_batch(session, pixels)
        calls: dict[str, Callable[[], Any]] = {
            "session": lambda: alone(session, pixels, batch),
            "pool": lambda: in_threads(single.session(IMAGE_EMBED), pixels, BULK_BATCH, cores),
            "encode_image": lambda: whole.encode_image([str(path) for path in paths]),
            "bulk": lambda: embed(open_source([place]), single, dest, force=True),
        }
        for run in calls.values():
            run()
        rates, cpu_ms = in_turns(calls, len(paths), rounds)
    return {
        "batch": batch,
        "cores": cores,
        "pictures_per_s": {name: round(rate, 1) for name, rate in rates.items()},
        "cpu_ms_per_picture": {name: round(value, 3) for name, value in cpu_ms.items()},
        "bulk_share": round(rates["bulk"] / rates["session"], 3),
        "pictures_per_s_and_core": round(rates["bulk"] / cores, 1),
    }


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out", type=Path)
    parser.add_argument("--pictures", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        places = write_pictures(Path(folder), given.pictures)
        found = {
            name: measure(given.out, place, Path(folder) / "bulk.parquet", given.rounds)
            for name, place in places.items()
        }
    for name, row in found.items():
        rates = ", ".join(f"{key} {value}" for key, value in row["pictures_per_s"].items())
        cpu = ", ".join(f"{key} {value}" for key, value in row["cpu_ms_per_picture"].items())
        share = f"bulk is {100 * row['bulk_share']:.0f} % of the session"
        print(f"{name}: {rates} pictures/s; {share}; CPU {cpu} ms")
    result = {"environment": environment(), "pictures": given.pictures, "results": found}
    if given.json:
        given.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main()

"""Opens sessions and runs them many times, and asserts that its memory stays; run by test_overhead.

Usage: python -m support.runs.repeat_runs DIRECTORY.
"""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import numpy as np
from support.tiny_onnx import linear

from internvl_edge.runtime.ort.options import OrtOptions
from internvl_edge.runtime.ort.session import OrtSession


def resident_nbytes() -> int:
    gc.collect()
    fields = Path("/proc/self/statm").read_text(encoding="ascii").split()
    return int(fields[1]) * 4096


def open_and_run_often(folder: str) -> None:
    """100 sessions and 10,000 runs; the first ones fill caches and are not counted."""
    path = linear(Path(folder) / "a.onnx")
    feeds = {"x": np.ones((2, 4), np.float32)}
    options = OrtOptions(num_threads=1)

    def open_and_run(times: int) -> None:
        for _ in range(times):
            with OrtSession(path, options=options) as session:
                session.run(feeds)

    open_and_run(20)
    before = resident_nbytes()
    open_and_run(100)
    assert resident_nbytes() - before < 100 * 50_000
    with OrtSession(path, options=options) as session:
        for _ in range(1000):
            session.run(feeds)
        before = resident_nbytes()
        for _ in range(10_000):
            session.run(feeds)
        assert resident_nbytes() - before < 10_000 * 100


if __name__ == "__main__":
    open_and_run_often(sys.argv[1])

"""Sessions that generation needs, of a compiled directory."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from internvl_edge import open_session
from internvl_edge.runtime.generation.cache import PAST, HostDecoding
from internvl_edge.runtime.session import Session
from internvl_edge.types import Array

COMPONENTS = ("vision", "image_queries", "decoder")


class Compiled:
    """The sessions of a compiled directory that generation needs."""

    def __init__(self, out: Path) -> None:
        self.sessions = {name: open_session(out, name) for name in COMPONENTS}
        self.decoder: Session = self.sessions["decoder"]

    def cache(self, pixels: Array) -> dict[str, Array]:
        hidden = self.sessions["vision"].run({"pixel_values": pixels})
        found = self.sessions["image_queries"].run(hidden)
        return {name: found[name] for name in found if name.startswith("present.")}


def on_host(session: Session, cache: dict[str, Array]) -> HostDecoding:
    return HostDecoding(session, {n.replace("present.", PAST): v for n, v in cache.items()})


def noise(seed: int = 0, rows: int = 2) -> Array:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((rows, 3, 28, 28)).astype(np.float32)

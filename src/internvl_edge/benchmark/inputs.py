"""Seeded inputs of a measurement: arrays for a component, and a picture for the whole way."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from internvl_edge.artifact import Artifact, TensorSpec
from internvl_edge.runtime.feeds import numpy_dtype
from internvl_edge.runtime.generation.fixed_cache import WRITE_INDICES, capacity_of
from internvl_edge.types import Array

__all__ = [
    "as_taken",
    "from_picture",
    "seeded_feeds",
    "seeded_picture",
    "takes_levels",
]

DEFAULT_LENGTH = 32  # of texts, in tokens
WIDTH, HEIGHT, COARSE = 640, 480, 20  # of the picture; pixels between its colours
QUALITY = 90  # of its JPEG

Arrays = dict[str, Array]


def seeded_feeds(artifact: Artifact, component: str, batch: int) -> Arrays:
    """Make inputs of the right shapes; speed does not depend on the values."""
    rng = np.random.default_rng(0)
    feeds: Arrays = {}
    specs = {spec.name: spec for spec in artifact.manifest.components[component].inputs}
    room = capacity_of(specs) or 2 * DEFAULT_LENGTH
    past = min(DEFAULT_LENGTH, room // 2)
    length = min(DEFAULT_LENGTH, room - past)
    sizes = {"batch": batch, "length": length, "past": past, "past+length": past + length}
    for spec in specs.values():
        shape = [n if isinstance(n, int) else sizes[n] for n in spec.shape]
        if spec.dtype == "uint8":
            feeds[spec.name] = rng.integers(0, 256, shape, np.uint8)
        elif "float" in spec.dtype:
            feeds[spec.name] = rng.standard_normal(shape).astype(numpy_dtype(spec.dtype))
        elif spec.name == "position_ids":
            feeds[spec.name] = np.broadcast_to(np.arange(shape[1]), shape) + past
        elif spec.name == WRITE_INDICES:
            feeds[spec.name] = np.full(shape, past, np.int64)
        elif spec.name == "attention_mask":
            feeds[spec.name] = np.ones(shape, np.int64)
        else:
            llama = artifact.manifest.language_model
            vocabulary = 2 if llama is None else llama["vocab_size"]
            feeds[spec.name] = rng.integers(1, vocabulary, shape)
    return feeds


def as_taken(feeds: Arrays, inputs: Mapping[str, TensorSpec]) -> Arrays:
    """Cast floats to the dtypes that a session takes: an engine's cache may have 16 bits."""
    return {
        name: array.astype(numpy_dtype(inputs[name].dtype)) if _is_float(array) else array
        for name, array in feeds.items()
    }


def _is_float(array: Array) -> bool:
    return "float" in array.dtype.name


def seeded_picture() -> bytes:
    """Draw a JPEG of 640 by 480 in soft colours: noise takes longer to decode than a photo."""
    from PIL import Image

    shape = (HEIGHT // COARSE, WIDTH // COARSE, 3)
    colours = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    file = io.BytesIO()
    picture = Image.fromarray(colours).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
    picture.save(file, "JPEG", quality=QUALITY)
    return file.getvalue()


def takes_levels(artifact: Artifact) -> bool:
    """Tell whether its graphs take uint8 and normalise it themselves."""
    return any(
        spec.name == "pixel_values" and spec.dtype == "uint8"
        for record in artifact.manifest.components.values()
        for spec in record.inputs
    )


def from_picture(
    run: Callable[[Mapping[str, Any]], object],
    artifact: Artifact,
    picture: bytes,
    batch: int,
    *,
    as_levels: bool,
) -> Callable[[], object]:
    """Make a call that begins with encoded pictures: decode, resize, normalise, run.

    Args:
        run: takes the component's feeds.
        artifact: whose transform it is.
        picture: a file's bytes.
        batch: how often it is in a call.
        as_levels: feed uint8 [B,3,S,S]; else float32 [B,3,S,S], normalised.
    """
    from internvl_edge.runtime.images.transform import Preprocessing, pixel_levels, pixel_values

    preprocessing = Preprocessing.from_json(artifact.manifest.preprocessing)
    prepare = pixel_levels if as_levels else pixel_values
    pictures = [picture] * batch
    return lambda: run({"pixel_values": prepare(pictures, preprocessing)})

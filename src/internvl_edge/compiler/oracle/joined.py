"""The joined graph (``steps.publish.joined_graph``), compared with the components that it joins."""

from __future__ import annotations

from collections.abc import Container, Mapping
from pathlib import Path

import numpy as np

from internvl_edge.artifact.components import IMAGE_EMBED, JOINED_GRAPH, TEXT_EMBED
from internvl_edge.compiler.oracle.run_graph import run_part
from internvl_edge.export.compare import agreements, require_agreement
from internvl_edge.runtime.tasks.compare import LOGIT_SCALE
from internvl_edge.runtime.tasks.vectors import unit
from internvl_edge.types import Array

__all__ = ["require_joined"]


def require_joined(
    directory: Path, feeds: Mapping[str, Array], listed: Container[str] = (JOINED_GRAPH,)
) -> None:
    """Run the joined graph, on one picture more than there are texts, and both components.

    Args:
        directory: has their graphs and weights.
        feeds: ``pixel_values``, ``input_ids`` and ``attention_mask`` of some samples.
        listed: the directory's files; there is nothing to compare where none is a joined graph.

    Raises:
        VerificationError: it does not give what they do.
    """
    if JOINED_GRAPH not in listed:
        return
    pixels = {"pixel_values": np.concatenate([feeds["pixel_values"], feeds["pixel_values"][:1]])}
    texts = {name: feeds[name] for name in ("input_ids", "attention_mask")}
    images = run_part(directory / f"{IMAGE_EMBED}.onnx", None, None, pixels, None)
    words = run_part(directory / f"{TEXT_EMBED}.onnx", None, None, texts, None)
    u, t = unit(images["image_embeds"]), unit(words["text_embeds"])
    logits = LOGIT_SCALE * u @ t.T
    expected = {
        "logits_per_image": logits,
        "logits_per_text": logits.T,
        "text_embeds": t,
        "image_embeds": u,
    }
    # an id of padding is masked whatever the caller says
    unmasked = {**texts, "attention_mask": np.ones_like(texts["attention_mask"])}
    actual = run_part(directory / JOINED_GRAPH, None, None, {**pixels, **unmasked}, None)
    require_agreement(agreements(expected, actual), JOINED_GRAPH, "fp32", "its components")

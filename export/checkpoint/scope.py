"""What of a checkpoint the chosen components read: only that has to be there, and sound.

The vision side of a model whose language model another tool has quantized compiles without it.
A part is the beginning of parameters' names, up to the first dot.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from internvl_edge.artifact.components import COMPONENTS
from internvl_edge.export.config.checkpoint import CheckpointConfig, available_components

__all__ = ["PARTS", "is_in_scope", "parameters_read", "parts_read"]

# Component → the parts that its module has; a chat model's projector has either name.
PARTS: dict[str, tuple[str, ...]] = {
    "vision": ("vision_model",),
    "image_embed": ("vision_model", "clip_projector"),
    "image_pool": ("clip_projector",),
    "image_queries": ("qllama", "query_tokens", "clip_projector2"),
    "text_embed": ("qllama", "text_projection"),
    "matcher": ("qllama", "query_tokens", "itm_head"),
    "decoder": ("qllama",),
    "chat_vision": ("vision_model", "mlp1", "mm_projector"),
    "chat_queries": ("queries", "mm_projector"),
    "chat_decoder": ("language_model",),
}
QUERIES = "query_tokens"  # read with QLLaMA wherever one of its streams is calibrated


def parts_read(
    config: CheckpointConfig, components: Collection[str] | None, *, is_quantized: bool
) -> frozenset[str] | None:
    """Collect the parts that components read; None: all that there are.

    Args:
        config: of the checkpoint.
        components: that will be compiled; None: all of them.
        is_quantized: True where they will be calibrated: a stream of images runs through the
            vision tower before it comes to the language model.
    """
    if components is None or set(components) >= set(available_components(config)):
        return None
    if any(name not in PARTS for name in components):
        return None
    streams = {COMPONENTS[name].stream for name in components} - {None}
    if is_quantized and streams - {"image", "text"}:
        return None
    parts = {part for name in components for part in PARTS[name]}
    return frozenset(parts | ({QUERIES} if is_quantized and "text" in streams else set()))


def parameters_read(names: Iterable[str], components: Collection[str]) -> set[str]:
    """Select the parameters that graphs of components read."""
    return {
        name
        for name in names
        for component in components
        if is_in_scope(name, PARTS.get(component)) and COMPONENTS[component].reads(name)
    }


def is_in_scope(name: str, parts: Collection[str] | None) -> bool:
    """Tell whether a parameter belongs to one of the parts."""
    return parts is None or name.partition(".")[0] in parts

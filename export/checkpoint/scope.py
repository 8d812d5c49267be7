"""What of a checkpoint the chosen components read: only that has to be there, and sound.

The vision side of a model whose language model another tool has quantized compiles without it.
A part is the beginning of parameters' names, up to the first dot; which ones a component reads
stands in the table of components.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from internvl_edge.artifact.components import find_component
from internvl_edge.export.config.checkpoint import CheckpointConfig, available_components

__all__ = ["is_in_scope", "parameters_read", "parts_read"]

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
    chosen = [find_component(name) for name in components]
    if not all(component.parts for component in chosen):
        return None
    streams = {component.stream for component in chosen} - {None}
    if is_quantized and streams - {"image", "text"}:
        return None
    parts = {part for component in chosen for part in component.parts}
    return frozenset(parts | ({QUERIES} if is_quantized and "text" in streams else set()))


def parameters_read(names: Iterable[str], components: Collection[str]) -> set[str]:
    """Select the parameters that graphs of components read."""
    return {
        name
        for name in names
        for component in map(find_component, components)
        if is_in_scope(name, component.parts or None) and component.reads(name)
    }


def is_in_scope(name: str, parts: Collection[str] | None) -> bool:
    """Tell whether a parameter belongs to one of the parts."""
    return parts is None or name.partition(".")[0] in parts

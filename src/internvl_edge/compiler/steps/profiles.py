"""Profiles of engines: the shapes that they accept, asked for or usual."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, replace

from internvl_edge.artifact import Manifest
from internvl_edge.artifact.components import find_component
from internvl_edge.artifact.sidecar import Range
from internvl_edge.errors import UsageError
from internvl_edge.export.engine.build import ShapeRanges
from internvl_edge.runtime.generation.fixed_cache import capacity_of

Asked = ShapeRanges | Mapping[str, Range] | None  # a profile, or ranges instead of the usual

IN_PLACE_BATCH = (1, 1, 4)
# An image's tokens and a question are read at once; a picture of twelve tiles has 3328 tokens.
CHAT_PROFILE = ShapeRanges(batch=(1, 1, 4), length=(1, 320, 3584), past=(0, 512, 4096))
# One conversation: every position of a call has logits of its own, 3584 of 64000 take 0.9 GB.
CHAT_DECODER_PROFILE = replace(CHAT_PROFILE, batch=(1, 1, 1))


def profile_from(**sizes: str) -> ShapeRanges:
    """Make a profile from texts such as ``batch="1,4,16"``: smallest, usual and largest size.

    Raises:
        UsageError: not three whole numbers in order.
    """
    return ShapeRanges(**ranges_from(**sizes))


def ranges_from(**sizes: str | None) -> dict[str, Range]:
    """Parse the ranges of those dimensions that are given; see :func:`profile_from`."""
    ranges = {}
    for name, text in sizes.items():
        if text is None:
            continue
        parts = text.split(",")
        if len(parts) != 3 or not all(part.strip().isdecimal() for part in parts):
            raise UsageError(f"--{name}: expected three sizes such as 1,4,16, found {text!r}")
        ranges[name] = (int(parts[0]), int(parts[1]), int(parts[2]))
    return ranges


def profile_for(manifest: Manifest, component: str, asked: Asked) -> ShapeRanges:
    """Choose the profile of a component, no longer than the positions its model has.

    Args:
        manifest: of the directory.
        component: its name.
        asked: a profile, or ranges instead of the usual ones.

    Raises:
        UsageError: a profile that was asked for is longer.
    """
    usual, llama, known = ShapeRanges(), manifest.language_model, find_component(component)
    if manifest.model.get("chat"):
        usual = CHAT_DECODER_PROFILE if known.takes_cache else CHAT_PROFILE
    ranges = asdict(asked) if isinstance(asked, ShapeRanges) else dict(asked or {})
    if llama is None:
        return replace(usual, **ranges)
    internvl = manifest.model.get("internvl")
    queries = internvl["num_query_token"] if internvl and known.has_queries else 0
    longest = llama["max_position_embeddings"] - queries
    capacity = capacity_of({spec.name: spec for spec in manifest.components[component].inputs})
    if capacity is not None:  # a session takes memory for the whole cache of every row
        batch = min(usual.batch, IN_PLACE_BATCH)
        longest, usual = min(longest, capacity), replace(usual, batch=batch)
    length = ranges.get("length", _capped(usual.length, longest))
    if length[2] > longest:
        raise UsageError(
            f"--length: {component} has positions for {longest} tokens, asked for up to {length[2]}"
        )
    room = longest - length[0]  # a call adds one token at least
    past = ranges.get("past", usual.past)
    if past in (usual.past, ShapeRanges().past):  # not asked for
        past = _capped(past, room)
    if past[2] > room and "past" in _dimensions(manifest, [component]):
        raise UsageError(
            f"--past: {component} has {longest} positions, asked for up to {past[2]} before "
            f"{length[0]} or more new ones"
        )
    return replace(usual, **ranges | {"length": length, "past": past})


def require_dimensions(
    manifest: Manifest, components: Sequence[str], asked: Mapping[str, Range]
) -> None:
    """Refuse sizes of a dimension that no component has."""
    for size in sorted({*asked} - _dimensions(manifest, components)):
        is_fixed = size == "past" and any(find_component(name).takes_cache for name in components)
        why = ", as --cache-capacity fixed it when OUT was exported" if is_fixed else ""
        raise UsageError(
            f"--{size}: expected a component with that dimension, found {', '.join(components)}"
            f"{why}; leave --{size} out"
        )


def _capped(sizes: Range, most: int) -> Range:
    low, typical, high = sizes
    return min(low, most), min(typical, most), min(high, most)


def _dimensions(manifest: Manifest, components: Collection[str]) -> set[str]:
    """Collect the dimensions of components' inputs that are decided at run time."""
    specs = [spec for name in components for spec in manifest.components[name].inputs]
    return {size for spec in specs for size in spec.shape if isinstance(size, str)}

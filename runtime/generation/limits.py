"""The limits of a decoder: positions; of an engine rows at once, tokens of a prompt too."""

from __future__ import annotations

from internvl_edge.artifact import Manifest
from internvl_edge.errors import ContextLengthError, UsageError
from internvl_edge.runtime.generation.batch import Generation
from internvl_edge.runtime.generation.fixed_cache import capacity_of
from internvl_edge.runtime.session import Session

__all__ = ["num_positions", "require_room", "rows_at_once"]


def num_positions(manifest: Manifest, component: str) -> int:
    """Count the positions of a decoder's cache: its capacity, or as many as its model has."""
    capacity = capacity_of({spec.name: spec for spec in manifest.components[component].inputs})
    llama = manifest.language_model or {}
    return int(llama["max_position_embeddings"] if capacity is None else capacity)


def rows_at_once(session: Session, batch_size: int, how: Generation) -> int:
    """Count the rows of a request that run together: with their beams, as many as are taken."""
    limit = session.largest.get("batch")
    return batch_size if limit is None else min(batch_size, limit // how.num_beams)


def require_room(session: Session, component: str, length: int, past: int, how: Generation) -> None:
    """Refuse, before any work, a request for which a decoder's engine was built too small.

    Args:
        session: of the decoder.
        component: ``decoder`` or ``chat_decoder``.
        length: tokens of the longest prompt.
        past: positions before it in the cache.
        how: the options.

    Raises:
        UsageError, ContextLengthError: which limit, and what is needed.
    """
    largest = session.largest
    last = past if how.max_new_tokens == 1 else past + length + how.max_new_tokens - 2
    reasons = {
        "batch": (how.num_beams, f"{how.num_beams} beams"),
        "length": (length, f"{length} tokens of a prompt"),
        "past": (last, f"{past + length} positions before the {how.max_new_tokens} new tokens"),
    }
    for name, (need, why) in reasons.items():
        if need > largest.get(name, need):
            kind = UsageError if name == "batch" else ContextLengthError
            raise kind(
                f"the engine of {component} takes {name} up to {largest[name]}, {need} are needed "
                f"for {why}; ask for less, or build the engine for a larger {name}"
            )

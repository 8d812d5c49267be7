"""The plan of a directory's weights: brought with the checkpoint's shards, or written anew."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from internvl_edge.artifact.components import COMPONENTS, WEIGHTS_FILE
from internvl_edge.compiler.plan import ExportOptions, Plan
from internvl_edge.compiler.weights.layout import (
    CHAT_TOKENS,
    POSITIONS,
    quantized_layout,
    shape_of,
)
from internvl_edge.compiler.weights.tensors import STORED_TYPES
from internvl_edge.errors import UsageError
from internvl_edge.export.checkpoint.names import Joined
from internvl_edge.export.checkpoint.shards import DTYPES, TensorEntry
from internvl_edge.export.components import build_component
from internvl_edge.export.graph.dtypes import POLICIES
from internvl_edge.export.models import Chat, InternViT, InternVL
from internvl_edge.export.weights.writer import Layout
from internvl_edge.quantize.fold import Derived


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsPlan:
    """The way of every parameter that is read into OUT."""

    reads: Mapping[str, frozenset[str]]  # component → the parameters that its graph reads
    brought: frozenset[str]  # parameters that lie in the checkpoint's own shards, which are brought
    layout: Layout  # of the weights file: what is converted, copied or quantized


def plan_weights(plan: Plan, model: InternVL | Chat | InternViT) -> WeightsPlan:
    """Decide where every parameter comes from, and what is written.

    Args:
        plan: what will be compiled.
        model: of the plan's source, on the meta device; of any depth.

    Raises:
        UsageError: shards are to be brought that cannot be.
    """
    reads = {component: _read_by(plan, component, model) for component in plan.components}
    tensors, policy = plan.source.tensors, POLICIES[plan.base]
    needed = {
        name: DTYPES[STORED_TYPES[policy.dtype_of(name)]]
        for name in sorted(set[str]().union(*reads.values()))
    }
    if any(COMPONENTS[name].takes_embeds for name in reads):  # by the runtime, as it is stored
        needed.setdefault(CHAT_TOKENS, tensors[CHAT_TOKENS].dtype)
    if plan.recipe is not None:
        layout = quantized_layout(plan, needed)
        return WeightsPlan(reads=reads, brought=frozenset(), layout=layout)
    held = held_weights(plan, needed)
    is_brought = can_bring(plan.options, needed, held)
    if not is_brought and plan.options.weights == "copy":  # not as shards lie, but the same values
        needed |= {name: entry.dtype for name, entry in held.items()}
    brought = frozenset(held if is_brought else ())
    layout = {n: (dtype, shape_of(plan, n)) for n, dtype in needed.items() if n not in brought}
    if layout and WEIGHTS_FILE in {held[name].file.name for name in brought}:
        raise UsageError(
            f"{plan.checkpoint.path / WEIGHTS_FILE}: what its shards do not hold as graphs need it "
            "is written to a file of that name beside them; give the shard another name"
        )
    return WeightsPlan(reads=reads, brought=brought, layout=layout)


def _read_by(plan: Plan, name: str, model: InternVL | Chat | InternViT) -> frozenset[str]:
    """Name the parameters of a component's parts, without those that its graph has no use for."""
    component, chat = COMPONENTS[name], plan.source.config.chat
    parts = {key.partition(".")[0] for key in build_component(component, model).state_dict()}
    read = {n for n in plan.source.tensors if n.partition(".")[0] in parts and component.reads(n)}
    is_tied = chat is not None and chat.llama is not None and chat.llama.tie_word_embeddings
    if component.takes_embeds and not is_tied:  # where it is, the table is the head too
        read.discard(CHAT_TOKENS)
    return frozenset(read)


def held_weights(plan: Plan, needed: Iterable[str]) -> dict[str, TensorEntry]:
    """Select the needed parameters that the checkpoint's files have as they are, in one run."""
    resized = plan.image_size != plan.source.config.vision.image_size
    return {
        name: plan.source.tensors[name]
        for name in needed
        if (name != POSITIONS or not resized)
        and not isinstance(plan.source.tensors[name], Joined | Derived)
    }


def can_bring(
    options: ExportOptions,
    needed: Mapping[str, np.dtype[Any]],
    held: Mapping[str, TensorEntry],
) -> bool:
    """Tell whether the checkpoint's own shards can be what the graphs read.

    Raises:
        UsageError: they are to be linked, and a tensor is not aligned to its item size.
    """
    is_auto = options.weights == "auto"
    if options.align is not None:
        return False
    if is_auto and any(needed[name] != entry.dtype for name, entry in held.items()):
        return False
    crooked = [n for n, entry in held.items() if entry.offset % entry.dtype.itemsize]
    if crooked and options.weights == "link":
        entry = held[crooked[0]]
        raise UsageError(
            f"--weights link: {entry.file}: expected offsets that are multiples of the item size, "
            f"found {crooked[0]} at {entry.offset} ({len(crooked)} such tensor(s)); use --weights "
            "copy, which writes them anew, or --align without --weights"
        )
    return not crooked

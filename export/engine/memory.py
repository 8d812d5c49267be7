"""The memory and disk that a builder of engines takes.

TensorRT-RTX reads weights from the mapped file and keeps the engine's bytes in memory until the
last of them is written. Of linear layers that read one tensor (q, k and v, gate and up) it makes
one product, whose weight is one more copy; gate and up are joined on disk before
(``graph.join_pairs``), where they are not in 4 bits. A decoder has a profile for prompts and one
for tokens: in 16 bits its engine holds merged weights and single ones, and merged ones are copied
for either; in fewer it has not been measured. By TensorRT-RTX 1.7 at the widths of InternViT-6B,
QLLaMA and InternVL2.5-2B; see ``docs/LOG.md``.
"""

from __future__ import annotations

from internvl_edge.artifact.components import find_component
from internvl_edge.errors import ResourceError
from internvl_edge.export.precision import QUANTIZED, precision_of
from internvl_edge.files.memory import available_memory

BUILDER_NBYTES = 250_000_000
BUILDER_NBYTES_PER_BLOCK = 1_000_000
# A vision block has one qkv and no gate: nothing is merged. Of QLLaMA's weights two thirds are.
MERGED_SHARE = 0.66
# Gate and up; with keys and values of cross-attention 0.44. In 8 bits embeddings weigh more.
JOINED_SHARE, JOINED_SHARE_8_BITS = 0.42, 0.38


def joined_nbytes(component: str, weights_nbytes: int, precision: str) -> int:
    """Compute the disk that weights joined for a builder take until the engine is built.

    Args:
        component: its name.
        weights_nbytes: bytes of its weights.
        precision: of the export: one for all, or one per tower.
    """
    known = find_component(component)
    if not known.is_language:
        return 0
    own = precision_of(precision, component)
    is_quantized = known.stream is not None and own in QUANTIZED
    if is_quantized and own.startswith("int4"):
        return 0
    return int((JOINED_SHARE_8_BITS if is_quantized else JOINED_SHARE) * weights_nbytes)


def engine_nbytes(component: str, weights_nbytes: int, precision: str) -> int:
    """Compute the bytes of the weights that a component's engine holds, some of them twice."""
    is_double = _holds_both(component, precision)
    return weights_nbytes + (int(MERGED_SHARE * weights_nbytes) if is_double else 0)


def _holds_both(component: str, precision: str) -> bool:
    is_narrow = precision_of(precision, component) in QUANTIZED
    return find_component(component).takes_cache and not is_narrow


def builder_nbytes(component: str, weights_nbytes: int, num_blocks: int, precision: str) -> int:
    """Compute the anonymous memory that building a component's engine takes."""
    merged = int(MERGED_SHARE * weights_nbytes) if find_component(component).is_language else 0
    if _holds_both(component, precision):
        merged *= 2
    else:
        merged -= joined_nbytes(component, weights_nbytes, precision)
    own = BUILDER_NBYTES + BUILDER_NBYTES_PER_BLOCK * num_blocks
    return own + engine_nbytes(component, weights_nbytes, precision) + merged


def require_memory_to_build(
    component: str, weights_nbytes: int, num_blocks: int, precision: str
) -> None:
    """Refuse an engine that this machine cannot build, before the system kills the builder.

    Raises:
        ResourceError: what it needs, and what there is.
    """
    need = builder_nbytes(component, weights_nbytes, num_blocks, precision)
    free = available_memory()
    if need > free:
        raise ResourceError(
            f"{component}: an engine of {weights_nbytes / 1e9:.2f} GB of weights takes "
            f"{need / 1e9:.2f} GB of memory to build, {free / 1e9:.2f} GB are free; choose "
            "int8 or fp8, other --components, or a larger machine"
        )

"""The names that a chat checkpoint's tensors have in its files, and the parts that are packed.

A chat model is published in two layouts and with several language models. Whatever the files call
a tensor, a checkpoint calls it as the layout ``internvl_chat`` does with a LLaMA:

    in the files                                  here
    vision_tower.encoder.layer.0.lambda_1         vision_model.encoder.layers.0.ls1
    model.language_model.layers.0.…               language_model.model.layers.0.…
    language_model.model.layers.0.feed_forward.w1 language_model.model.layers.0.mlp.gate_proj
    …attention.wqkv, …self_attn.qkv_proj          …self_attn.q_proj, k_proj, v_proj

Transformers' own layout (``vision_tower.``) has two generations of names, told apart by a
``model.`` in front. It shares ``language_model.model.`` with the other layout, so that the
vision tower's names decide which one it is, tensor by tensor.

Rows of a packed matrix that lie together stay where they are: a part of it is a shorter run of
the same file, and can be linked. Rows that do not are read from several runs (``Joined``):

    Phi-3      qkv_proj = q | k | v,  gate_up_proj = gate | up         runs of the file
    InternLM2  wqkv, for each key/value head: its query heads, k, v    q, k and v are joined
    transformers' vision tower: q_proj, k_proj, v_proj apart           attn.qkv is joined
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from internvl_edge.errors import CheckpointError
from internvl_edge.export.checkpoint.shards import DTYPES, TensorEntry
from internvl_edge.export.config.language import LanguageConfig
from internvl_edge.types import Array

__all__ = ["Joined", "chat_entries"]

Entries = Mapping[str, TensorEntry]
FLOATS = tuple(DTYPES[code] for code in ("F64", "F32", "F16", "BF16"))

# Beginnings of names in transformers' layout; the newer generation first.
NATIVE_PREFIXES = {
    "model.vision_tower.": "vision_model.",
    "model.multi_modal_projector.": "mlp1.",
    "model.language_model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
    "vision_tower.": "vision_model.",
    "multi_modal_projector.": "mlp1.",
}
NATIVE_ONLY = tuple(prefix for prefix in NATIVE_PREFIXES if prefix != "lm_head.")
# Parts of names between the prefix and ``weight``, with the dots around them.
NATIVE_VISION = {
    "embeddings.cls_token": "embeddings.class_embedding",
    "embeddings.position_embeddings": "embeddings.position_embedding",
    "embeddings.patch_embeddings.projection": "embeddings.patch_embedding",
    "encoder.layer": "encoder.layers",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "attention.projection_layer": "attn.proj",
    "attention.q_norm": "attn.q_norm",
    "attention.k_norm": "attn.k_norm",
    "lambda_1": "ls1",
    "lambda_2": "ls2",
}
NATIVE_PROJECTOR = {"layer_norm": "0", "linear_1": "1", "linear_2": "3"}
INTERNLM2 = {
    "tok_embeddings": "embed_tokens",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
NATIVE_QKV = re.compile(r"^(vision_model\.encoder\.layers\.\d+\.)attention\.([qkv])_proj\.(.+)$")
PACKED = re.compile(
    r"^(language_model\.model\.layers\.\d+\.)"
    r"(attention\.wqkv|self_attn\.qkv_proj|mlp\.gate_up_proj)\.weight$"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Joined(TensorEntry):
    """A tensor whose rows lie in several runs of the files; it can be read, and not linked."""

    parts: tuple[TensorEntry, ...]

    def read(self) -> Array:
        """Read every run into its place."""
        values = np.empty(self.shape, self.dtype)
        first = 0
        for part in self.parts:
            values[first : first + part.shape[0]] = part.read()
            first += part.shape[0]
        return values


def chat_entries(entries: Entries, language: LanguageConfig | None) -> dict[str, TensorEntry]:
    """Give a chat model's tensors their names here, and take packed ones apart.

    Args:
        entries: by their names in the files, of either layout.
        language: the language model; None: its tensors are not read, and keep their names.

    Raises:
        CheckpointError: a packed tensor of another shape than its model has.
    """
    is_native = any(name.startswith(NATIVE_ONLY) for name in entries)
    renamed: dict[str, TensorEntry] = {}
    apart: dict[str, dict[str, TensorEntry]] = {}
    for name, entry in entries.items():
        ours = _our_name(name, is_native=is_native)
        match = NATIVE_QKV.match(ours) if is_native else None
        if match is not None:
            block, which, kind = match.groups()
            apart.setdefault(f"{block}attn.qkv.{kind}", {})[which] = entry
        else:
            renamed.update(_unpacked(ours, entry, language))
    for name, parts in apart.items():
        if len(parts) == len("qkv"):
            renamed[name] = joined([parts[which] for which in "qkv"])
    return renamed


def _our_name(name: str, *, is_native: bool) -> str:
    if is_native:
        prefix = next((p for p in NATIVE_PREFIXES if name.startswith(p)), "")
        ours = NATIVE_PREFIXES.get(prefix, "") + name.removeprefix(prefix)
        if ours.startswith("vision_model."):
            return replaced(ours, NATIVE_VISION)
        return replaced(ours, NATIVE_PROJECTOR) if ours.startswith("mlp1.") else ours
    if not name.startswith("language_model."):
        return name
    if name.startswith("language_model.output."):
        return name.replace(".output.", ".lm_head.", 1)
    return replaced(name, INTERNLM2)


def replaced(name: str, parts: Mapping[str, str]) -> str:
    """Replace whole parts of a dotted name."""
    dotted = f".{name}."
    for old, new in parts.items():
        dotted = dotted.replace(f".{old}.", f".{new}.", 1)
    return dotted[1:-1]


# --- packed matrices -----------------------------------------------------------------------------


def _unpacked(
    name: str, entry: TensorEntry, language: LanguageConfig | None
) -> Iterator[tuple[str, TensorEntry]]:
    """Yield the parts of a packed matrix under their names, or the tensor itself."""
    match = None if language is None else PACKED.match(name)
    if match is None or language is None or entry.dtype not in FLOATS:  # or packed by another tool
        yield name, entry
        return
    block, kind = match.groups()
    size, kv = language.head_dim, language.num_key_value_heads
    queries, inner = language.num_attention_heads * size, language.intermediate_size
    rows = 2 * inner if kind == "mlp.gate_up_proj" else queries + 2 * kv * size
    if entry.shape != (rows, language.hidden_size):
        raise CheckpointError(
            f"{entry.file}: {entry.name}: expected shape {(rows, language.hidden_size)}, found "
            f"{entry.shape}"
        )
    if kind == "mlp.gate_up_proj":
        yield f"{block}mlp.gate_proj.weight", rows_of(entry, 0, inner)
        yield f"{block}mlp.up_proj.weight", rows_of(entry, inner, inner)
        return
    parts: Sequence[TensorEntry]
    if kind == "self_attn.qkv_proj":
        starts = ((0, queries), (queries, kv * size), (queries + kv * size, kv * size))
        parts = [rows_of(entry, *start) for start in starts]
    else:
        parts = _of_groups(entry, kv, queries // kv, size)
    for which, part in zip("qkv", parts, strict=True):
        yield f"{block}self_attn.{which}_proj.weight", part


def _of_groups(entry: TensorEntry, groups: int, queries: int, size: int) -> list[TensorEntry]:
    """Return q, k and v of rows that lie by key/value head: its queries, its key, its value."""
    step = queries + 2 * size
    offsets = ((0, queries), (queries, size), (queries + size, size))
    return [
        joined([rows_of(entry, group * step + first, count) for group in range(groups)])
        for first, count in offsets
    ]


def rows_of(entry: TensorEntry, first: int, count: int) -> TensorEntry:
    """Return rows of a matrix that lie together: a shorter run of the same file."""
    row_nbytes = entry.dtype.itemsize * math.prod(entry.shape[1:])
    return replace(
        entry,
        shape=(count, *entry.shape[1:]),
        offset=entry.offset + first * row_nbytes,
        nbytes=count * row_nbytes,
    )


def joined(parts: Sequence[TensorEntry]) -> TensorEntry:
    """Return one tensor of the rows of several, one after the other; a single one stays linkable.

    Raises:
        CheckpointError: they are not of one type and width.
    """
    first = parts[0]
    if any((p.dtype, p.shape[1:]) != (first.dtype, first.shape[1:]) for p in parts):
        kinds = ", ".join(f"{p.name}: {p.dtype}{p.shape}" for p in parts)
        raise CheckpointError(f"{first.file}: expected parts of one type and width, found {kinds}")
    if len(parts) == 1:
        return first
    return Joined(
        name=first.name,
        dtype=first.dtype,
        shape=(sum(part.shape[0] for part in parts), *first.shape[1:]),
        file=first.file,
        offset=first.offset,
        nbytes=sum(part.nbytes for part in parts),
        parts=tuple(parts),
    )

"""Checkpoints on disk: a Hugging Face directory, read tensor by tensor and never as a whole.

Needs no PyTorch: ``load`` makes our PyTorch model of one.

The safetensors headers of all shards are parsed and validated when a checkpoint is opened; the
tensors stay on disk as (file, offset, length) until something asks for one. Nothing is ever
written there. A checkpoint that changes while we read it is refused in the end.

Names are canonical: those of InternVL-14B, with ``vision_model.`` before a bare InternViT's.
InternVL-14B's ``lm_head`` and ``embed_tokens`` are never tied (docs/model.md, section 2.7).
Pickle files are refused here; ``internvl-edge convert`` turns them into safetensors.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from internvl_edge.errors import CheckpointError
from internvl_edge.export.checkpoint.names import chat_entries
from internvl_edge.export.checkpoint.oddities.choose import choose_safetensors
from internvl_edge.export.checkpoint.oddities.explain import refuse_mismatch
from internvl_edge.export.checkpoint.oddities.wrappers import best_named
from internvl_edge.export.checkpoint.parameters import expected_shapes
from internvl_edge.export.checkpoint.scope import is_in_scope, parts_read
from internvl_edge.export.checkpoint.shards import (
    DTYPES,
    MAX_LISTED,
    FileState,
    TensorEntry,
    all_entries,
    file_state,
    raise_problems,
)
from internvl_edge.export.checkpoint.side_files import sha256_of
from internvl_edge.export.config.chat import ChatConfig
from internvl_edge.export.config.checkpoint import CheckpointConfig, VisionConfig, load_config
from internvl_edge.files.reading import require_unicode
from internvl_edge.types import Array, Shape

__all__ = ["FLOATS", "Checkpoint", "named_entries", "num_expected", "open_checkpoint"]

logger = logging.getLogger(__name__)

READING_THREADS = 2
MAX_DEPTH = 256  # of a vision tower
BLOCKS = "vision_model.encoder.layers."
LLAVA_NAMES = {
    "model.vision_tower.vision_tower.": "vision_model.",
    "model.mm_projector.": "mm_projector.",
    "model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
}
# Where the tower is InternVL-14B, of which only the queries' outputs are read.
LLAVA_TOWER = "model.vision_tower.vision_tower."
LLAVA_QUERY_NAMES = {
    f"{LLAVA_TOWER}vision_model.": "vision_model.",
    f"{LLAVA_TOWER}qllama.": "queries.qllama.",
    f"{LLAVA_TOWER}query_tokens": "queries.query_tokens",
    **LLAVA_NAMES,
}
OUTPUT_LAYER = "language_model.lm_head.weight"
UNREAD = ("lm_head.", "model.embed_tokens.")  # of QLLaMA, by its queries
COMPUTED = (  # buffers that some versions of transformers store
    ".rotary_emb.inv_freq",
    ".rotary_emb.original_inv_freq",
    ".rotary_emb.cos_cached",
    ".rotary_emb.sin_cached",
    "embeddings.position_ids",
)
UNREAD_HEADS = ("clip_projector", "text_projection", "logit_scale", "itm_head")
FLOATS = tuple(DTYPES[code] for code in ("F64", "F32", "F16", "BF16"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A directory's configuration and where each of its tensors lies."""

    path: Path
    config: CheckpointConfig
    tensors: Mapping[str, TensorEntry]  # canonical name → place
    shards: tuple[Path, ...]
    states: tuple[FileState | None, ...]  # of the shards, before their headers were read

    @property
    def is_partial(self) -> bool:
        """True where it was opened for components that do not read all of it."""
        return len(self.tensors) < len(expected_shapes(self.config))

    def read(self, name: str) -> Array:
        """Read one tensor by canonical name, in its stored dtype."""
        return self.tensors[name].read()

    def side_sha256(self, name: str) -> str | None:
        """Hash a file besides the weights; None where there is none."""
        return sha256_of(self.path, name)

    def content_sha256(
        self,
        done: Callable[[int], None] = lambda nbytes: None,
        targets: Mapping[str, np.dtype[Any]] | None = None,
        *,
        only: Collection[str] | None = None,
    ) -> str:
        """Hash every tensor's values; refuse NaN, infinities and what a conversion would make them.

        Args:
            done: told the bytes of each tensor that was read.
            targets: the float types that tensors will be converted to.
            only: the tensors to read; None: all of them.

        Raises:
            CheckpointError: names every tensor that is not finite, or is beyond its target's range.
        """
        bad, digest, kinds = [], hashlib.sha256(), targets or {}
        remedy = ""
        chosen = {n: entry for n, entry in self.tensors.items() if only is None or n in only}

        def examine(item: tuple[str, TensorEntry]) -> tuple[str, str | None]:
            return item[1].checked_sha256(kinds.get(item[0]))

        with ThreadPoolExecutor(READING_THREADS) as pool:
            for (name, entry), (sha256, problem) in zip(
                chosen.items(), pool.map(examine, chosen.items()), strict=True
            ):
                if problem is not None:
                    bad.append(f"{name}: {problem}")
                    remedy = remedy or ("; choose bf16 or fp32" if "beyond" in problem else "")
                digest.update(f"{name} {entry.dtype} {entry.shape} {sha256}\n".encode())
                done(entry.nbytes)
        raise_problems(self.path, bad, remedy)
        return digest.hexdigest()

    def require_unchanged(self) -> None:
        """Make sure that no shard was changed or replaced since this checkpoint was opened.

        Raises:
            CheckpointError: names every shard that was.
        """
        changed = [
            f"{shard.name}: {before} when it was opened, now {now or 'gone'}"
            for shard, before in zip(self.shards, self.states, strict=True)
            if (now := file_state(shard)) != before
        ]
        if changed:
            raise CheckpointError(
                f"{self.path}: changed while it was read: {'; '.join(changed[:MAX_LISTED])}; "
                "run again once nothing writes there"
            )


def open_checkpoint(
    directory: Path | str,
    components: Collection[str] | None = None,
    *,
    is_quantized: bool = False,
) -> Checkpoint:
    """Open a checkpoint directory and prove that its tensors are those its config asks for.

    Args:
        directory: where it lies.
        components: what will be compiled: only what these read has to be there, and sound; None:
            everything.
        is_quantized: True where they will be calibrated, which runs the towers before them too.

    Raises:
        CheckpointError: not a checkpoint, pickle only, a malformed or missing shard, or tensors
            missing, unexpected, of a wrong shape or type: all of them named in one message.
    """
    path = Path(directory)
    require_unicode(path)
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise CheckpointError(f"{path} {what}; expected a Hugging Face checkpoint directory")
    config = load_config(path)
    chosen = choose_safetensors(path)
    states = tuple(file_state(shard) for shard in chosen.files)
    entries, notes = named_entries(config, all_entries(chosen.files), expected_shapes(config))
    config = _with_output_layer(config, entries)
    whole = expected_shapes(config)
    parts = parts_read(config, components, is_quantized=is_quantized)
    expected = {name: shape for name, shape in whole.items() if is_in_scope(name, parts)}
    entries = {name: entry for name, entry in entries.items() if is_in_scope(name, parts)}
    tensors, problems = _match(expected, entries)
    if problems:
        refuse_mismatch(path, config, problems, entries, len(tensors))
    for note in (*chosen.notes, *notes):
        logger.warning("%s: %s", path, note)
    return Checkpoint(path=path, config=config, tensors=tensors, shards=chosen.files, states=states)


# --- names ---------------------------------------------------------------------------------------


def named_entries(
    config: CheckpointConfig, entries: Mapping[str, TensorEntry], expected: Mapping[str, Shape]
) -> tuple[dict[str, TensorEntry], list[str]]:
    """Give entries their canonical names, and say what was left out of those on disk.

    Raises:
        CheckpointError: two of them are the same parameter.
    """
    return best_named(entries, expected, lambda named: _canonical(config, named))


def num_expected(config: CheckpointConfig, entries: Mapping[str, TensorEntry]) -> int:
    """Count the entries that a configuration calls for."""
    expected = expected_shapes(config)
    named, _ = named_entries(config, entries, expected)
    return sum(name in expected for name in named)


def _canonical(config: CheckpointConfig, entries: dict[str, TensorEntry]) -> dict[str, TensorEntry]:
    """Give entries their canonical names; drop those that are computed rather than stored."""
    kept = {n: e for n, e in entries.items() if not n.endswith(COMPUTED)}
    if config.kind == "vit" and not any(n.startswith("vision_model.") for n in kept):
        return {"vision_model." + n: e for n, e in kept.items()}
    if config.kind == "vit":  # of a composite of another kind, the tower is what we compile
        return {n: e for n, e in kept.items() if n.startswith("vision_model.")}
    return kept if config.chat is None else _of_chat(config.vision, config.chat, kept)


def _of_chat(
    vision: VisionConfig, chat: ChatConfig, kept: dict[str, TensorEntry]
) -> dict[str, TensorEntry]:
    """Give both layouts the same names; drop blocks and language models that are not compiled."""
    depth, behind = vision.num_hidden_layers, chat.num_blocks_behind
    dropped = [f"{BLOCKS}{i}." for i in range(depth + behind, MAX_DEPTH)]
    if chat.num_queries:
        moved = {f"{BLOCKS}{depth + i}.": f"queries.vision_behind.{i}." for i in range(behind)}
        kept = {_renamed(_renamed(n, LLAVA_QUERY_NAMES), moved): e for n, e in kept.items()}
        dropped += [f"queries.qllama.{name}" for name in UNREAD]
        dropped += [f"vision_model.{name}" for name in UNREAD_HEADS]
    elif chat.layout == "llava":
        kept = {_renamed(name, LLAVA_NAMES): entry for name, entry in kept.items()}
    else:
        kept = chat_entries(kept, chat.llama)
    if chat.llama is None:
        dropped.append("language_model.")
    return {n: e for n, e in kept.items() if not n.startswith(tuple(dropped))}


def _renamed(name: str, names: Mapping[str, str]) -> str:
    """Replace the beginning of a name, if it is one of those that are listed."""
    for old, new in names.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def _with_output_layer(
    config: CheckpointConfig, entries: dict[str, TensorEntry]
) -> CheckpointConfig:
    """Take the output layer that the files hold, whatever the config says of tied embeddings.

    Files of transformers 5 say that they are tied where they are not. The flag decides only where
    there is no such tensor: with it the token embedding is the output layer, without it the
    tensor is missing.
    """
    chat = config.chat
    if chat is None or chat.llama is None or OUTPUT_LAYER not in entries:
        return config
    llama = replace(chat.llama, tie_word_embeddings=False)
    return replace(config, chat=replace(chat, llama=llama))


def _match(
    expected: Mapping[str, Shape], entries: dict[str, TensorEntry]
) -> tuple[dict[str, TensorEntry], list[str]]:
    problems = [f"{name}: missing" for name in expected if name not in entries]
    for name, entry in entries.items():
        if name not in expected:
            problems.append(f"{name}: unexpected")
        elif entry.shape != expected[name]:
            problems.append(f"{name}: expected shape {expected[name]}, found {entry.shape}")
        elif entry.dtype not in FLOATS:
            problems.append(f"{name}: expected a float type, found {entry.dtype}")
    return {name: entries[name] for name in expected if name in entries}, problems

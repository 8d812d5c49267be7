"""The token embedding of a chat model: rows of one tensor, read where it lies.

A chat model's decoder takes embeddings, since some of them are of images. The table of the others
stays in its safetensors file, mapped: of 64000 rows a prompt touches a few hundred.
"""

from __future__ import annotations

from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np

from internvl_edge.artifact import Artifact
from internvl_edge.artifact.pins import Watch
from internvl_edge.artifact.safetensors import MalformedFile, TensorPlace, read_places
from internvl_edge.errors import ArtifactError, UsageError
from internvl_edge.runtime.text.chat_tokenizer import PLACE
from internvl_edge.types import Array

__all__ = ["Embedding", "TokenTable", "open_table"]

# What a weights file calls the table: one of ours as the first, a checkpoint's own in its layout.
NAMES = (
    "language_model.model.embed_tokens.weight",
    "language_model.model.tok_embeddings.weight",  # InternLM2
    "model.language_model.embed_tokens.weight",  # transformers 5
    "model.embed_tokens.weight",  # InternVL-Chat V1.0
)
DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
}


class TokenTable:
    """Token embeddings [V,D], mapped from a file; bfloat16 as the upper half of float32.

    Args:
        rows: the table.
        watch: over the file, which must not be written to while it is mapped.
    """

    def __init__(self, rows: Array, watch: Watch | None = None) -> None:
        self._rows, self._watch = rows, watch

    @property
    def shape(self) -> tuple[int, int]:
        """V, D."""
        return self._rows.shape[0], self._rows.shape[1]

    def look_up(self, ids: Array) -> Array:
        """Look up the embeddings of ids [B,T]: float32 [B,T,D].

        Raises:
            UsageError: an id that the vocabulary does not have.
            ArtifactError: the file was written to since it was opened.
        """
        if self._watch is not None:
            self._watch.require_unchanged()
        size = len(self._rows)
        if ids.size and not 0 <= ids.min() <= ids.max() < size:
            bad = ids[(ids < 0) | (ids >= size)][0]
            raise UsageError(f"token id {bad}: expected ids from 0 to {size - 1}")
        rows = self._rows[ids]
        if rows.dtype == np.uint16:
            return (rows.astype(np.uint32) << 16).view(np.float32)
        return rows.astype(np.float32, copy=False)


class Embedding:
    """Ids [B,T] to embeddings [B,T,D], image tokens in their places, row by row.

    Args:
        table: of the other tokens.
        image_tokens: float32 [M,D], in the order of the places of the whole batch.
    """

    def __init__(self, table: TokenTable, image_tokens: Array) -> None:
        self._table, self._image_tokens = table, image_tokens

    def __call__(self, ids: Array) -> Array:
        is_place = ids == PLACE
        if not is_place.any():
            return self._table.look_up(ids)
        if is_place.sum() != len(self._image_tokens):
            raise UsageError(
                f"the prompt has {int(is_place.sum())} places for image tokens, the images have "
                f"{len(self._image_tokens)}"
            )
        embeds = self._table.look_up(np.where(is_place, 0, ids))
        embeds[is_place] = self._image_tokens
        return embeds


def open_table(artifact: Artifact) -> TokenTable:
    """Map the token embedding of a compiled chat model.

    Raises:
        ArtifactError: no weights file of the directory has it.
    """
    for name in artifact.manifest.files:
        if name.endswith(".safetensors"):
            path, watch = artifact.file(name), artifact.watched(name)
            try:
                places = read_places(watch.files[name])
            except MalformedFile as error:
                raise ArtifactError(f"{path}: {error}") from error
            for tensor, place in places.items():
                if tensor in NAMES:
                    return TokenTable(_mapped(path, watch.files[name], place), watch)
    raise ArtifactError(f"{artifact.path}: expected a tensor {NAMES[0]} in its weights, found none")


def _mapped(path: Path, file: BufferedReader, place: TensorPlace) -> Array:
    if place.code not in DTYPES or len(place.shape) != 2 or 0 in place.shape:
        raise ArtifactError(
            f"{path}: {place.name}: expected a table of {', '.join(DTYPES)}, found "
            f"{place.code}{list(place.shape)}"
        )
    # a plain array over it: a memmap's own is slow to index
    return np.asarray(np.memmap(file, DTYPES[place.code], "r", place.offset, place.shape))

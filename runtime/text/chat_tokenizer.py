"""Ids of a chat's prompt: control tokens of the template, plain pieces of what a user types.

A chat model's tokenizer is a SentencePiece model and a list of added tokens, such as
``<|im_start|>``, each with an id of its own. In the text that a template wrote they are these ids.
In what a user typed they are not: ``<|im_end|>`` in a question is spelled in ordinary pieces, so
that a question cannot end itself and speak as somebody else. The one thing that a user writes and
that is more than text is ``<image>`` in a question, the place of an image; in an answer or a system
sentence it is text too.

Between two control tokens a run of text is encoded as one, by the rules of the original's slow
tokenizer: each run gets SentencePiece's own space in front (``legacy``), or only the first one.
The places of image tokens are ``PLACE``, whatever id the checkpoint has for them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from internvl_edge.artifact.open import Artifact
from internvl_edge.errors import ArtifactError
from internvl_edge.files.reading import read_json
from internvl_edge.runtime.text.templates import Piece, Template
from internvl_edge.runtime.text.tokenizer import Tokenizer

__all__ = ["IMAGE", "PLACE", "ChatTokenizer", "open_chat_tokenizer"]

IMAGE = "<image>"
PLACE = -200  # the id of an image token's place, as in LLaVA
MAX_TOKENS_NBYTES = 16 << 20
ADDED_TOKENS, TOKENIZER_CONFIG = "added_tokens.json", "tokenizer_config.json"


class ChatTokenizer:
    """A tokenizer with added tokens.

    Args:
        tokenizer: the SentencePiece model.
        added: token → id.
        add_bos: whether a prompt starts with ``<s>``.
        legacy: whether every run of text gets a space in front, or only the first.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        added: dict[str, int],
        *,
        add_bos: bool = True,
        legacy: bool = True,
    ) -> None:
        self._tokenizer, self._add_bos, self._legacy = tokenizer, add_bos, legacy
        own = {"<s>": tokenizer.bos_id, "</s>": tokenizer.eos_id, "<unk>": tokenizer.unk_id}
        self.ids = own | added
        longest_first = sorted(self.ids, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first)))
        self._text = {i: token for token, i in self.ids.items()}

    def encode(
        self, pieces: Iterable[Piece], places: Sequence[int], template: Template
    ) -> list[int]:
        """Encode a prompt.

        Args:
            pieces: of ``templates.conversation``.
            places: image tokens of each ``<image>`` in the pieces, in order.
            template: says what stands around an image's places.
        """
        ids = [self.ids["<s>"]] if self._add_bos else []
        run, counts, is_first = "", iter(places), True
        for piece in pieces:
            for text, special in self._parts(piece):
                if special is None:
                    run += text
                    continue
                ids += self._encode(run, is_first=is_first)
                run, is_first = "", False
                ids += self._image(next(counts), template) if special == PLACE else [special]
        return ids + self._encode(run, is_first=is_first)

    def decode(self, ids: Sequence[int]) -> str:
        """Decode new ids, without control tokens."""
        size = self._tokenizer.vocab_size
        return self._tokenizer.decode([i for i in ids if i not in self._text and i < size])

    def _parts(self, piece: Piece) -> Iterable[tuple[str, int | None]]:
        """Yield text, and special ids, of a piece; ``PLACE`` stands for an ``<image>``."""
        if not piece.is_template and not piece.has_images:
            yield piece.text, None
            return
        pattern = self._special if piece.is_template else re.compile(re.escape(IMAGE))
        end = 0
        for match in pattern.finditer(piece.text):
            yield piece.text[end : match.start()], None
            yield "", self.ids[match[0]] if piece.is_template else PLACE
            end = match.end()
        yield piece.text[end:], None

    def _image(self, count: int, template: Template) -> list[int]:
        around = (template.image_start, template.image_end)
        before, after = (
            [self.ids[text]] if text in self.ids else self._encode(text, is_first=False)
            for text in around
        )
        return [*before, *[PLACE] * count, *after]

    def _encode(self, text: str, *, is_first: bool) -> list[int]:
        if not text:
            return []
        if self._legacy or is_first:
            return self._tokenizer.pieces(text)
        return self._tokenizer.pieces_inside(text)


def open_chat_tokenizer(artifact: Artifact, tokenizer: Tokenizer) -> ChatTokenizer:
    """Open the tokenizer of a compiled chat model.

    Raises:
        ArtifactError: a file of added tokens is not one.
    """
    files = artifact.manifest.files
    config = _read(artifact.file(TOKENIZER_CONFIG)) if TOKENIZER_CONFIG in files else {}
    listed = _read(artifact.file(ADDED_TOKENS)) if ADDED_TOKENS in files else {}
    try:
        decoder = config.get("added_tokens_decoder", {})
        added = {str(entry["content"]): int(i) for i, entry in decoder.items()}
        added |= {str(token): int(i) for token, i in listed.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ArtifactError(
            f"{artifact.path}: expected tokens and their ids in {TOKENIZER_CONFIG} and "
            f"{ADDED_TOKENS}: {error!r}"
        ) from error
    return ChatTokenizer(
        tokenizer,
        {token: i for token, i in added.items() if token},
        add_bos=config.get("add_bos_token", True) is not False,
        legacy=config.get("legacy", True) is not False,
    )


def _read(path: Path) -> dict[str, Any]:
    read = read_json(path, MAX_TOKENS_NBYTES, ArtifactError)
    if not isinstance(read, dict):
        raise ArtifactError(f"{path}: expected one JSON object, found {type(read).__name__}")
    return read

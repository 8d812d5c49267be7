"""Ids of a chat's prompt: control tokens of the template, plain pieces of what a user types.

A chat model's tokenizer is a vocabulary, SentencePiece (``sentence_pieces``) or BPE
(``bpe_pieces``), and a list of control tokens, such as ``<|im_start|>``, each with an id of its
own. In the text that a template wrote they are these ids. In what a user typed they are not:
``<|im_end|>`` in a question is spelled in ordinary pieces, so that a question cannot end itself and
speak as somebody else. The one thing that a user writes and that is more than text is ``<image>``
in a question, the place of an image; in an answer or a system sentence it is text too. There
``<think>`` and ``</think>`` are the tokens they look like, which end nothing.

Between two control tokens a run of text is encoded as one. Some control tokens eat the white space
after them (Phi-3's roles, and the line break that the template writes there). The places of image
tokens are ``PLACE``, whatever id the checkpoint has for them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol, TypeAlias

from internvl_edge.artifact import Artifact
from internvl_edge.errors import UsageError
from internvl_edge.runtime.text.bpe_pieces import BpePieces
from internvl_edge.runtime.text.sentence_pieces import SentencePieces
from internvl_edge.runtime.text.templates import Piece, Template
from internvl_edge.runtime.text.token_files import (
    SENTENCEPIECE,
    TOKENIZER_FILES,
    AddedToken,
    TokenFiles,
    read_token_files,
)

__all__ = [
    "IMAGE",
    "IMAGE_TOKEN",
    "PLACE",
    "ChatTokenizer",
    "Pieces",
    "load_chat_tokenizer",
    "open_chat_tokenizer",
    "spelled",
]

IMAGE = "<image>"
IMAGE_TOKEN = "<IMG_CONTEXT>"  # how a place is spelled
PLACE = -200  # the id of an image token's place, as in LLaVA
THOUGHT = re.compile("</?think>")
# Classes that put every run to SentencePiece as it is; their files' ``legacy`` is no key of theirs
AS_THE_MODEL_SAYS = ("InternLM2Tokenizer", "InternLM3Tokenizer")


class Pieces(Protocol):
    """A vocabulary of ordinary pieces: runs of text to ids and back."""

    controls: dict[str, int]  # text → id of its own control tokens, which no text is turned into
    begin: list[int]  # ids of its own that a prompt begins with
    size: int  # above every id that a text becomes

    def id_of(self, text: str) -> int | None:
        """Find the id of a piece; None: there is none."""

    def encode(self, text: str, *, is_first: bool) -> list[int]:
        """Encode a run of text; ``is_first``: nothing stands before it."""

    def opening(self, token: str) -> list[int]:
        """Return the ids before a control token that a prompt begins with."""

    def decode(self, ids: Sequence[int]) -> str:
        """Decode ids of pieces; others decode to nothing."""


Part: TypeAlias = str | AddedToken | int  # text, a control token, or image tokens in their places


class ChatTokenizer:
    """A vocabulary with control tokens.

    Args:
        pieces: the vocabulary.
        added: tokens added to it.
        add_bos: whether a prompt starts with the vocabulary's own beginning.
        pad_id: what rows are padded with; None: the tokenizer's files name none.
    """

    def __init__(
        self,
        pieces: Pieces,
        added: Iterable[AddedToken],
        *,
        add_bos: bool = True,
        pad_id: int | None = None,
    ) -> None:
        self._pieces, self.pad_id = pieces, pad_id
        self._begin = pieces.begin if add_bos else []
        own = (AddedToken(text=text, id=i) for text, i in pieces.controls.items())
        tokens = {token.text: token for token in (*own, *added) if token.text.strip()}
        self.ids = {text: token.id for text, token in tokens.items()}
        longest_first = sorted(tokens, key=len, reverse=True)
        self._tokens = tokens
        self._special = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        # An id with two names, as InternLM2's, is that of the added one.
        self._named = {token.id: token for token in tokens.values()}

    def encode(
        self, pieces: Iterable[Piece], places: Sequence[int], template: Template
    ) -> list[int]:
        """Encode a prompt.

        Args:
            pieces: of ``templates.conversation``.
            places: image tokens of each ``<image>`` in the pieces, in order.
            template: says what stands around an image's places.
        """
        ids, run, eats, is_first = list(self._begin), "", False, True
        parts = [*self._parts(pieces, iter(places), template)]
        for at, part in enumerate(parts):
            if isinstance(part, str):
                run += part
                if at + 1 < len(parts):
                    continue
            if eats:
                run = run.lstrip()
            if isinstance(part, AddedToken) and part.eats_before:
                run = run.rstrip()
            if run:
                ids += self._pieces.encode(run, is_first=is_first)
            elif is_first and isinstance(part, AddedToken):
                ids += self._pieces.opening(part.text)
            run, is_first = "", False
            if isinstance(part, AddedToken):
                ids.append(part.id)
                eats = part.eats_after
            elif isinstance(part, int):
                ids += [PLACE] * part
                eats = False
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Decode new ids, without control tokens; ids that have no token say nothing.

        Tokens that are listed as not special, such as ``<think>``, are spelled out.
        """
        text, run = "", list[int]()
        for i in ids:
            token = self._named.get(i)
            if token is None:
                run.append(i)
            elif not token.is_special:
                text += self._pieces.decode(run) + token.text
                run = []
        return (text + self._pieces.decode(run)).strip()

    @property
    def largest_id(self) -> int:
        """The largest id of a text's pieces; control tokens may have larger ones."""
        return self._pieces.size - 1

    def id_of(self, text: str) -> int | None:
        """Find the id of a control token or a piece; None: there is none."""
        own = self.ids.get(text)
        return self._pieces.id_of(text) if own is None else own

    def _parts(
        self, pieces: Iterable[Piece], places: Iterator[int], template: Template
    ) -> Iterator[Part]:
        for piece in pieces:
            if piece.is_template:
                yield from self._controls(piece.text, self._special)
            elif piece.has_thoughts:
                yield from self._controls(piece.text, THOUGHT)
            elif not piece.has_images:
                yield piece.text
            else:
                first, *others = piece.text.split(IMAGE)
                yield first
                for text in others:
                    yield from self._controls(template.image_start, self._special)
                    yield next(places)
                    yield from self._controls(template.image_end, self._special)
                    yield text

    def _controls(self, text: str, pattern: re.Pattern[str]) -> Iterator[Part]:
        """Yield a text and the control tokens in it."""
        end = 0
        for match in pattern.finditer(text):
            yield text[end : match.start()]
            yield self._tokens.get(match[0], match[0])  # not every model has <think>
            end = match.end()
        yield text[end:]


def spelled(pieces: Iterable[Piece], places: Sequence[int], template: Template) -> str:
    """Spell a prompt as text, with ``<IMG_CONTEXT>`` for every image token."""
    counts = iter(places)
    text = ""
    for piece in pieces:
        if not piece.has_images:
            text += piece.text
            continue
        first, *others = piece.text.split(IMAGE)
        text += first
        for other in others:
            tokens = IMAGE_TOKEN * next(counts)
            text += template.image_start + tokens + template.image_end + other
    return text


def load_chat_tokenizer(files: TokenFiles) -> ChatTokenizer:
    """Load the tokenizer of a directory.

    Raises:
        ArtifactError: its vocabulary is not one.
        MissingDependency: ``tokenizers``, for a BPE vocabulary.
    """
    config = files.config
    pieces: Pieces
    if files.kind == SENTENCEPIECE:
        pieces = SentencePieces(
            files.vocabulary,
            legacy=config.get("tokenizer_class") in AS_THE_MODEL_SAYS
            or config.get("legacy", True) is not False,
            add_space=config.get("add_prefix_space", True) is not False,
            roles=files.named,
            barred=frozenset(token.id for token in files.added if token.text.strip()),
        )
    else:
        pieces = BpePieces(files)
    pad = files.pad_token
    pad_id = None if pad is None else files.id_of(pad)
    return ChatTokenizer(
        pieces,
        files.added,
        add_bos=config.get("add_bos_token", True) is not False,
        pad_id=pieces.id_of(pad) if pad is not None and pad_id is None else pad_id,
    )


def open_chat_tokenizer(artifact: Artifact) -> ChatTokenizer:
    """Open the tokenizer of a compiled chat model.

    Raises:
        UsageError: the directory has none, as its checkpoint had none.
        ArtifactError: a file of it is not what its name says.
    """
    with artifact.holding(*filter(artifact.has, TOKENIZER_FILES)) as folder:
        files = read_token_files(lambda name: folder / name if artifact.has(name) else None)
        if files is not None:
            return load_chat_tokenizer(files)
    raise UsageError(
        f"{artifact.path} has no tokenizer, as its checkpoint had none: texts must be token "
        "ids, int [B,T]; for strings, put the model's tokenizer files beside the checkpoint's "
        "config.json and export again"
    )

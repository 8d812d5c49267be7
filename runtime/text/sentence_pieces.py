"""Text to SentencePiece's ids by the rules of LLaMA's slow tokenizer, and back.

A SentencePiece model has *user-defined* pieces, which it finds in any text: ``<|im_end|>`` in Yi's,
``[UNUSED_TOKEN_145]`` in InternLM2's, where that is another name of ``<|im_end|>``. A user who
types one would get a control token. So the model is read with these pieces marked unused: then
they are spelled in ordinary pieces, and every other text has the ids that it had. Pieces of white
space alone are text and stay; so do those of one character, which nothing else spells.

Where a text gets SentencePiece's own space in front:

    legacy       every run between two control tokens, where the model wants one at all
    not legacy   the first run of a prompt alone; white space at the start of a run is kept

Of a tokenizer that is not legacy the original puts the space before everything, also where a
control token comes first: the prompt then begins with a lone ``▁``, unless that token has a role
(``TokenFiles.named``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from internvl_edge.errors import ArtifactError
from internvl_edge.runtime.text.tokenizer import GUARD, SPACE, load_pieces, read_model

__all__ = ["SentencePieces"]

# Fields of SentencePiece's ModelProto: pieces (text, score, type) and the normaliser's rules.
PIECE, PIECE_TEXT, PIECE_SCORE, PIECE_TYPE = 0x0A, 0x0A, 0x15, 0x18
USER_DEFINED, UNUSED = 4, 5
# normalizer_spec { add_dummy_prefix: false }: protobuf merges what stands twice.
WITHOUT_SPACE = b"\x1a\x02\x18\x00"


class SentencePieces:
    """A SentencePiece model whose control tokens no text can name.

    Args:
        model: the path of a ``tokenizer.model``.
        legacy: whether every run gets a space in front, or only the first.
        add_space: whether the first does, of a tokenizer that is not legacy.
        roles: control tokens that a prompt may begin with without this space.
        barred: more ids that no text becomes, of added tokens that are ordinary pieces here.

    Raises:
        ArtifactError: it is no SentencePiece model with ``<s>``, ``</s>`` and ``<unk>``.
    """

    def __init__(
        self,
        model: Path,
        *,
        legacy: bool = True,
        add_space: bool = True,
        roles: frozenset[str] = frozenset(),
        barred: frozenset[int] = frozenset(),
    ) -> None:
        data = bytearray(read_model(model))
        self.controls: dict[str, int] = {}  # text → id of what no text is turned into
        for i, (text, at) in enumerate(_user_defined(data, str(model))):
            if at is not None and len(text) > 1 and text.replace(SPACE, " ").strip():
                data[at] = UNUSED
                self.controls[text] = i
        self._legacy, self._add_space, self._roles = legacy, add_space, roles
        self._pieces = load_pieces(bytes(data) + (b"" if legacy else WITHOUT_SPACE), str(model))
        self._guard = len(self._pieces.encode(GUARD))
        self.size: int = self._pieces.get_piece_size()
        for i in range(self.size):
            if self._pieces.is_control(i) or self._pieces.is_unknown(i):
                self.controls[self._pieces.id_to_piece(i)] = i
        self._barred = barred - {self._pieces.unk_id()}
        self.begin: list[int] = [self._pieces.bos_id()]  # of a prompt, unless the files say no

    def id_of(self, text: str) -> int | None:
        """Find the id of a piece; None: there is none."""
        i: int = self._pieces.piece_to_id(text)
        return i if self._pieces.id_to_piece(i) == text else None

    def encode(self, text: str, *, is_first: bool) -> list[int]:
        """Encode a run of text; ``is_first``: nothing stands before it."""
        if self._legacy:
            return self._ids(text) if text else []
        text = text.replace(SPACE, " ")
        if is_first and self._add_space:
            text = SPACE + text
        return self._ids(text, is_inside=text.startswith((SPACE, " ")))

    def opening(self, token: str) -> list[int]:
        """Return the ids before a control token that a prompt begins with."""
        if self._legacy or not self._add_space or token in self._roles:
            return []
        return self.encode("", is_first=True)

    def decode(self, ids: Sequence[int]) -> str:
        """Decode ids of pieces; others decode to nothing."""
        text: str = self._pieces.decode([i for i in ids if 0 <= i < self.size])
        return text

    def _ids(self, text: str, *, is_inside: bool = False) -> list[int]:
        ids = self._inside(text) if is_inside else self._pieces.encode(text)
        if self._barred.isdisjoint(ids):
            return ids
        # one character after the other
        first = self._inside(text[0]) if is_inside else self._pieces.encode(text[0])
        return [*first, *(i for one in text[1:] for i in self._inside(one))]

    def _inside(self, text: str) -> list[int]:
        """Encode a text that continues another, white space at its start included."""
        ids: list[int] = self._pieces.encode(GUARD + text)
        return ids[self._guard :]


def _user_defined(data: bytearray, name: str) -> Iterator[tuple[str, int | None]]:
    """Yield the text of every piece, and where the type of a user-defined one stands."""
    at = 0
    while at < len(data):
        key = data[at]
        if key & 7 != 2:
            raise ArtifactError(
                f"{name}: not a SentencePiece model: field {key >> 3} is no message"
            )
        length, start = _varint(data, at + 1, name)
        at = start + length
        if key != PIECE:
            continue
        record = data[start:at]
        if bytes((PIECE_TYPE, USER_DEFINED)) in record:
            yield _type_of(record, start, name)
        else:
            yield "", None  # another type: its text is of no interest


def _type_of(record: bytearray, start: int, name: str) -> tuple[str, int | None]:
    """Read one piece: its text, and where the byte of its type stands if it is user-defined."""
    at, text, place = 0, "", None
    while at < len(record):
        key = record[at]
        if key == PIECE_TEXT:
            length, begin = _varint(record, at + 1, name)
            at = begin + length
            text = record[begin:at].decode("utf-8", "replace")
        elif key == PIECE_TYPE:
            value, end = _varint(record, at + 1, name)
            place, at = start + at + 1 if value == USER_DEFINED else None, end
        elif key == PIECE_SCORE:
            at += 5
        else:
            raise ArtifactError(f"{name}: not a SentencePiece model: field {key >> 3} of a piece")
    return text, place


def _varint(data: bytearray, at: int, name: str) -> tuple[int, int]:
    """Read a varint: its value, and where the next byte is."""
    value = 0
    for shift in range(0, 63, 7):
        if at >= len(data):
            break
        value |= (data[at] & 0x7F) << shift
        at += 1
        if data[at - 1] < 0x80:
            return value, at
    raise ArtifactError(f"{name}: not a SentencePiece model: it ends in the middle")

"""The ids of one row as text: up to its end, and piece by piece as they come."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from internvl_edge.runtime.generation.batch import Generation
from internvl_edge.types import Array

__all__ = ["streamed", "until_end"]

REPLACEMENT = "\ufffd"  # half a character, decoded


def streamed(
    tokens: Iterator[Array], how: Generation, decode: Callable[[list[int]], str]
) -> Iterator[str]:
    """Yield the text of one row's tokens in pieces, as they come; none is empty.

    Only the tokens of the last piece are decoded again, which the next one may change: spaces are
    the text's own between two words, and not around it.
    """
    ids: list[int] = []  # of the last piece, and since
    count, told = 0, ""  # of the last piece: its tokens, and their text
    for token in tokens:
        if int(token[0]) in how.stop_ids:
            break
        ids.append(int(token[0]))
        text = decode(ids)
        is_whole = not text.endswith(REPLACEMENT)  # the last character may want another token
        if is_whole and text != told and text.startswith(told):
            yield text[len(told) :]
            del ids[:count]
            count, told = len(ids), decode(ids)
    text = decode(ids)
    if text != told:
        yield text[len(told) :]


def until_end(ids: list[int], how: Generation) -> list[int]:
    """Cut ids off at the first that ends a text."""
    ends = [at for at, token in enumerate(ids) if token in how.stop_ids]
    return ids[: ends[0]] if ends else ids

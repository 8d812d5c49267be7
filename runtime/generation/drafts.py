"""Drafts without a second model: what followed the same few tokens before.

An answer often repeats what stands in its prompt or in itself: names, numbers, a list's form. So
the tokens that followed the last occurrence of the last few are proposed as the next ones, and the
decoder reads them all in one call, which costs little more than one token where memory is what a
token waits for. Of the proposed tokens those count that would have been chosen anyway; the first
that would not is replaced, and what was read after it is forgotten.
"""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["Lookup"]

SIZES = (3, 2)  # of the last tokens that must have stood there before, the longer first


class Lookup:
    """Where a few tokens in a row stood last, in a prompt and its answer so far."""

    def __init__(self, ids: Iterable[int]) -> None:
        self._ids: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}  # tokens → where the last of them ended
        for token in ids:
            self.add(token)

    def add(self, token: int) -> None:
        """Note one more token."""
        for size in SIZES:
            if len(self._ids) >= size:
                self._after[tuple(self._ids[-size:])] = len(self._ids)
        self._ids.append(token)

    def propose(self, most: int) -> list[int]:
        """Propose the next tokens; none where the last ones never stood there before."""
        for size in SIZES:
            at = self._after.get(tuple(self._ids[-size:]))
            if at is not None:
                ids = self._ids[at : at + most]
                # a place of an image is no token
                return ids[: next((i for i, token in enumerate(ids) if token < 0), len(ids))]
        return []

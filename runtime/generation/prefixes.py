"""Caches of recent prompts: a conversation goes on where it ended.

Every turn of a conversation begins with all that was said before, images included, and a decoder's
cache of that is what reading it again would compute. So when an answer ends, keys and values of
its positions are kept, and the next prompt starts from those of the longest kept one that begins
with the same bytes: ids are compared, and of images the digest of what the decoder reads of them.
An image counts as a whole or not at all. One position at least is left to read, since its logits
are wanted.

What is kept is a copy, and what is taken is copied again: no two answers share memory, and nobody
is given positions of a prompt that is not the beginning of their own. Those of least recent use go
when the budget is spent; what is larger than the budget is not kept.

A program that sends all of a conversation with every question, as a server's clients do, sends its
images again too. What the vision tower made of them is kept in the same way (``ImageTokens``).
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from threading import RLock

import numpy as np

from internvl_edge.files.forks import in_children
from internvl_edge.runtime.text.chat_tokenizer import PLACE
from internvl_edge.types import Array

__all__ = ["ImageTokens", "Prefixes", "extended", "marks_of"]

Caches = dict[str, Array]  # present.{i}.key and .value, [1,heads,P,d]


def marks_of(ids: Sequence[int], images: Sequence[Array]) -> Array:
    """Mark positions, int64 [T,2], so that equal marks are equal inputs of a decoder.

    Args:
        ids: of a prompt, with places for image tokens.
        images: tokens of each image [N,D], in the order of their places.
    """
    marks = np.zeros((len(ids), 2), np.int64)
    marks[:, 0] = ids
    places = np.flatnonzero(marks[:, 0] == PLACE)
    start = 0
    for tokens in images:
        first, second = np.frombuffer(_digest(tokens), np.int64)
        # no id is negative, and the second is 0 for ids alone
        marks[places[start : start + len(tokens)]] = -1 - abs(int(first) >> 1), int(second) | 1
        start += len(tokens)
    return marks


def extended(marks: Array, ids: Sequence[int]) -> Array:
    """Mark more positions, of ids."""
    more = np.zeros((len(ids), 2), np.int64)
    more[:, 0] = ids
    return np.concatenate((marks, more))


class Prefixes:
    """The caches of recent prompts; thread-safe.

    Args:
        budget_nbytes: that they may take together; 0: none is kept.
    """

    def __init__(self, budget_nbytes: int) -> None:
        self.budget_nbytes = budget_nbytes
        self._kept: OrderedDict[bytes, tuple[Array, Caches]] = OrderedDict()  # last used last
        self._lock = RLock()  # a collector may close an answer here
        in_children(self, Prefixes._renew_lock)

    @property
    def nbytes(self) -> int:
        """Bytes that are kept now."""
        with self._lock:
            return self._nbytes()

    def find(self, marks: Array) -> tuple[int, Caches]:
        """Return how many positions a prompt has in common with a kept one, and their caches."""
        with self._lock:
            best, key = 0, b""
            for one, (kept, _) in list(self._kept.items()):
                length = _common(marks, kept)
                if length > best:
                    best, key = length, one
            if key not in self._kept:
                return 0, {}
            self._kept.move_to_end(key)
            caches = self._kept[key][1]
        return best, {name: values[:, :, :best] for name, values in caches.items()}

    def keep(self, marks: Array, caches: Mapping[str, Array]) -> None:
        """Keep the caches of positions, and drop what they make useless or there is no room for."""
        nbytes = sum(values.nbytes for values in caches.values()) + marks.nbytes
        if nbytes > self.budget_nbytes or not len(marks):
            return
        try:
            own = {name: np.array(values, order="C") for name, values in caches.items()}
        except MemoryError:  # the answer is there all the same
            return
        key = _digest(marks)
        with self._lock:
            for one, (kept, _) in list(self._kept.items()):
                if len(kept) <= len(marks) and (kept == marks[: len(kept)]).all():
                    del self._kept[one]
            self._kept[key] = marks.copy(), own
            while self._nbytes() > self.budget_nbytes:
                self._kept.popitem(last=False)

    def clear(self) -> None:
        """Forget all of them."""
        with self._lock:
            self._kept.clear()

    def _nbytes(self) -> int:
        return sum(
            marks.nbytes + sum(values.nbytes for values in caches.values())
            for marks, caches in list(self._kept.values())
        )

    def _renew_lock(self) -> None:
        self._lock = RLock()  # a collector may close an answer here


class ImageTokens:
    """What the language model reads of recent images, by the digest of their tiles; thread-safe.

    Args:
        budget_nbytes: that they may take together; 0: none is kept.
    """

    def __init__(self, budget_nbytes: int) -> None:
        self.budget_nbytes, self.nbytes = budget_nbytes, 0
        self._kept: OrderedDict[bytes, Array] = OrderedDict()  # last used last
        self._lock = RLock()  # a collector may close an answer here
        in_children(self, ImageTokens._renew_lock)

    def find(self, digest: bytes) -> Array | None:
        """Return the tokens of an image, which nobody may write to; None where none are kept."""
        with self._lock:
            if digest not in self._kept:
                return None
            self._kept.move_to_end(digest)
            return self._kept[digest]

    def keep(self, digest: bytes, tokens: Array) -> None:
        """Keep the tokens of an image, and drop those of least recent use beyond the budget."""
        if tokens.nbytes > self.budget_nbytes:
            return
        tokens = tokens.copy()
        tokens.flags.writeable = False  # it is shared from here on
        with self._lock:
            if digest not in self._kept:
                self._kept[digest] = tokens
                self.nbytes += tokens.nbytes
            while self.nbytes > self.budget_nbytes:
                self.nbytes -= self._kept.popitem(last=False)[1].nbytes

    def clear(self) -> None:
        """Forget all of them."""
        with self._lock:
            self._kept.clear()
            self.nbytes = 0

    def _renew_lock(self) -> None:
        self._lock = RLock()  # a collector may close an answer here


def _digest(array: Array) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(array).data, digest_size=16).digest()


def _common(marks: Array, kept: Array) -> int:
    """Count the positions that two prompts have in common, but for the last of the first."""
    most = min(len(marks) - 1, len(kept))
    differs = (marks[:most] != kept[:most]).any(axis=1)
    length = int(differs.argmax()) if differs.any() else most
    while length > 0 and marks[length, 1] and (marks[length - 1] == marks[length]).all():
        length -= 1  # to where this image begins
    return length

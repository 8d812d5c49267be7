"""A decoder's cache: handed through the host as arrays, or left on the device between steps.

**Long prompts** are read in pieces. Attention of T tokens to P positions holds T · P scores for
every head: 15 GB for a prompt of 16,384 tokens and 14 heads. A piece of ``PIECE`` tokens holds few,
and does not compute the scores of those after it, half of a prompt's, which the mask leaves out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from internvl_edge.files.memory import available_memory
from internvl_edge.runtime.feeds import LOGITS_FROM, POSITIONS, WRITE_INDICES, numpy_dtype
from internvl_edge.runtime.generation.fixed_cache import (
    MASK,
    PAST,
    PRESENT,
    capacity_of,
    placed,
    positions_of,
)
from internvl_edge.runtime.session import DecoderSession, Session
from internvl_edge.types import Array

Embed = Callable[[Array], Array]  # ids [B,T] → embeddings float32 [B,T,D]
NO_MASK = np.ones((1, 0), np.int64)
LAST = np.full(1, -1)  # position, whose logits alone a prompt needs
PIECE, LEAST = 512, 64  # tokens of a prompt at a time: so many, or fewer where memory is short
SHARE = 8  # of the memory that is free, one part in so many for a piece's scores
SCORE_NBYTES = 12  # float32, its softmax and its place in the mask


def start(
    session: Session,
    cache: Mapping[str, Array],
    embed: Embed | None = None,
    num_heads: int | None = None,
) -> HostDecoding | DeviceDecoding:
    """Begin decoding on a cache, which stays on the device where the session can leave it there.

    Args:
        session: of a ``decoder`` or a ``chat_decoder``.
        cache: what ``image_queries`` gave as ``present.{i}.key`` and ``.value``, [B,heads,P,d].
        embed: of a decoder that takes embeddings.
        num_heads: of its queries; None: as many as its keys have.
    """
    past = {name.replace(PRESENT, PAST, 1): values for name, values in cache.items()}
    if isinstance(session, DecoderSession):
        return DeviceDecoding(session, past, embed, num_heads)
    return HostDecoding(session, past, embed)


def empty_cache(session: Session, rows: int) -> dict[str, Array]:
    """Make a cache without positions, as a decoder's session takes it, by names of its outputs."""
    return {
        name.replace(PAST, PRESENT, 1): np.zeros(
            (rows, int(spec.shape[1]), 0, int(spec.shape[3])),
            numpy_dtype(spec.dtype),
        )
        for name, spec in session.inputs.items()
        if name.startswith(PAST)
    }


class _Layout:
    """The shape of a session's cache, and the feeds that go with it.

    Args:
        session: of a decoder.
        embed: of one that takes embeddings.
        num_heads: of its queries; None: as many as its keys have.
    """

    def __init__(self, session: Session, embed: Embed | None, num_heads: int | None = None) -> None:
        self._capacity, self._embed = capacity_of(session.inputs), embed
        self._num_heads = num_heads
        self.is_in_place, self._inputs = self._capacity is not None, session.inputs
        self.takes_drafts = self.is_in_place or "past" not in session.largest

    def past(self, cache: Mapping[str, Array]) -> dict[str, Array]:
        """Return a cache in the session's type, with room for all that comes if it grows not."""
        if self._capacity is None:
            return dict(cache)
        return {
            name: placed(values.astype(numpy_dtype(self._inputs[name].dtype)), self._capacity)
            for name, values in cache.items()
        }

    def feeds(self, ids: Array, mask: Array, positions: Array) -> dict[str, Array]:
        tokens = {"input_ids": ids} if self._embed is None else {"inputs_embeds": self._embed(ids)}
        where, first = {MASK: mask}, mask.shape[1] - ids.shape[1]
        if self._capacity is not None:
            where = positions_of(mask, first, self._capacity)
        return {**tokens, "position_ids": positions, **where}

    def pieces(
        self, feeds: Mapping[str, Array], mask: Array, size: int
    ) -> Iterator[dict[str, Array]]:
        """Divide the feeds of tokens that a mask [B,P+T] goes with, ``size`` of them at a time."""
        length = feeds[POSITIONS].shape[1]
        for start in range(0, length, size):
            end = min(start + size, length)
            piece = {
                n: v if n in (MASK, WRITE_INDICES) else v[:, start:end] for n, v in feeds.items()
            }
            if self.is_in_place:
                piece[WRITE_INDICES] = feeds[WRITE_INDICES] + start
            else:
                piece[MASK] = np.ascontiguousarray(mask[:, : mask.shape[1] - length + end])
            yield {name: np.ascontiguousarray(values) for name, values in piece.items()}

    def piece_size(self, rows: int, positions: int) -> int:
        """Choose how many tokens of a prompt to read at a time, by the memory that is free."""
        key = next(spec for name, spec in self._inputs.items() if name.startswith(PAST))
        heads = self._num_heads or int(key.shape[1])
        room = available_memory() // SHARE // (SCORE_NBYTES * rows * heads * positions)
        return max(LEAST, min(PIECE, room // LEAST * LEAST))


def _seen(mask: Array, count: int) -> slice | Array:
    """Find the first positions of one row that a mask does not leave out."""
    if mask[0, :count].all():
        return slice(count)
    seen: Array = np.flatnonzero(mask[0])[:count]
    return seen


class HostDecoding:
    """Any session; the cache goes in and comes out as arrays."""

    def __init__(
        self, session: Session, past: Mapping[str, Array], embed: Embed | None = None
    ) -> None:
        self._session, self._layout = session, _Layout(session, embed)
        self.goes_back, self.takes_drafts = self._layout.is_in_place, self._layout.takes_drafts
        self._past, self._mask = self._layout.past(past), NO_MASK

    def run(self, ids: Array, mask: Array, positions: Array) -> Array:
        return self.run_all(ids, mask, positions)[:, -1]

    def run_all(self, ids: Array, mask: Array, positions: Array) -> Array:
        feeds = self._layout.feeds(ids, mask, positions)
        outputs = self._session.run({**feeds, **self._past}, check=False)
        logits = outputs.pop("logits")
        self._past = {name.replace(PRESENT, PAST, 1): outputs[name] for name in outputs}
        self._mask = mask
        return logits

    def select(self, rows: Array) -> None:
        self._past = {name: values[rows] for name, values in self._past.items()}

    def positions(self, count: int) -> dict[str, Array]:
        """Return the first positions of the cache of one row, by names of outputs [1,heads,P,d].

        Positions that the last call's mask left out do not count.
        """
        seen = _seen(self._mask, count)
        return {n.replace(PAST, PRESENT, 1): v[:, :, seen] for n, v in self._past.items()}


class DeviceDecoding:
    """A session whose outputs stay on its device; what a step leaves is what the next one reads.

    What comes from outside is checked as any feed is. More rows than an engine takes at once go
    through the host, where they are divided.
    """

    def __init__(
        self,
        session: DecoderSession,
        past: Mapping[str, Array],
        embed: Embed | None = None,
        num_heads: int | None = None,
    ) -> None:
        self._session, self._layout = session, _Layout(session, embed, num_heads)
        self.goes_back, self.takes_drafts = self._layout.is_in_place, self._layout.takes_drafts
        self._names = list(past)
        self._cache: Sequence[Any] = [*self._layout.past(past).values()]
        self._is_there = False  # on the device
        self._num_rows = 0  # of what is there
        self._max_rows = session.largest.get("batch", math.inf)
        self._mask = NO_MASK  # of the last call

    def run(self, ids: Array, mask: Array, positions: Array) -> Array:
        feeds, length = self._layout.feeds(ids, mask, positions), ids.shape[1]
        if length == 1 or LOGITS_FROM not in self._session.optional:
            return self._run(ids, mask, feeds)[:, -1]
        size = length
        if length > LEAST and self._session.pads:
            size = self._layout.piece_size(len(ids), mask.shape[1])
        end = mask.shape[1] - length
        for piece in self._layout.pieces(feeds, mask, size):
            some = piece[POSITIONS].shape[1]
            end += some
            logits = self._run(ids[:, :some], mask[:, :end], {**piece, LOGITS_FROM: LAST})
        return logits[:, -1]

    def run_all(self, ids: Array, mask: Array, positions: Array) -> Array:
        return self._run(ids, mask, self._layout.feeds(ids, mask, positions))

    def _run(self, ids: Array, mask: Array, feeds: dict[str, Array]) -> Array:
        self._num_rows, self._mask = len(ids), mask
        if not self._session.pads:
            self._mask = np.ones_like(mask)  # padding has no places
            feeds[WRITE_INDICES] = mask[:, : mask.shape[1] - ids.shape[1]].sum(axis=1)
            if ids.shape[1] > 1 and (len(ids) > 1 or not mask.all()):
                return self._run_apart(feeds, mask)
        if self._is_there:
            logits, self._cache = self._session.step(feeds, self._names, self._cache)
        else:
            feeds |= dict(zip(self._names, self._cache, strict=True))
            fits = len(ids) <= self._max_rows
            if fits:
                outputs = self._session.run_device(feeds, check=False)
                logits = outputs["logits"].numpy()
            else:
                outputs = self._session.run(feeds, check=False)
                logits = outputs["logits"]
            self._names = [name.replace(PRESENT, PAST, 1) for name in outputs if name != "logits"]
            self._cache = [value for name, value in outputs.items() if name != "logits"]
            self._is_there = fits
        every: Array = logits
        return every

    def _held(self) -> list[Array]:
        """Copy the cache to the host, where it may be already."""
        return self._session.fetch(self._cache) if self._is_there else [*self._cache]

    def _run_apart(self, feeds: Mapping[str, Array], mask: Array) -> Array:
        """Read each row by itself, without its padding; the cache passes through the host."""
        held = self._held()
        tokens = next(name for name in ("input_ids", "inputs_embeds") if name in feeds)
        real, every, caches = mask[:, -feeds[tokens].shape[1] :] > 0, list[Array](), list[Any]()
        for row, kept in enumerate(real):
            mine = {name: values[row : row + 1] for name, values in feeds.items()}
            mine |= {name: mine[name][:, kept] for name in (tokens, POSITIONS)}
            mine |= {n: v[row : row + 1] for n, v in zip(self._names, held, strict=True)}
            mine |= {name: feeds[name] for name in (LOGITS_FROM,) if name in feeds}
            outputs = self._session.run(mine, check=False)
            every.append(outputs.pop("logits"))
            caches.append([*outputs.values()])
        self._names = [name.replace(PRESENT, PAST, 1) for name in outputs]
        self._cache = [np.concatenate(values) for values in zip(*caches, strict=True)]
        self._is_there, width = False, max(logits.shape[1] for logits in every)
        return np.concatenate(
            [np.pad(one, ((0, 0), (width - one.shape[1], 0), (0, 0))) for one in every]
        )

    def select(self, rows: Array) -> None:
        if not self._is_there:
            self._cache = [values[rows] for values in self._cache]
        elif len(rows) > self._max_rows:
            self._cache = [values[rows] for values in self._held()]
            self._is_there = False
        elif len(rows) != self._num_rows or (rows != np.arange(len(rows))).any():
            self._cache = self._session.take_rows(self._cache, rows)
        self._num_rows = len(rows)

    def positions(self, count: int) -> dict[str, Array]:
        """Copy the first positions of the cache to the host; see ``HostDecoding.positions``."""
        held = self._held()
        names = [name.replace(PAST, PRESENT, 1) for name in self._names]
        seen = _seen(self._mask, count)
        return {n: values[:, :, seen] for n, values in zip(names, held, strict=True)}

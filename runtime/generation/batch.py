"""The parts that every way of continuing a prompt shares: options, the prompt, its rows under way.

A prompt of T tokens is read at once, after the P positions that the cache holds already (the
image's queries); from then on every call gives the decoder one token per row. Prompts are rows of
ids until they are padded, on the left and here alone. The mask over everything so far is 1 where
there is no padding, and a token's position counts what is not padding before it:
cumsum(mask) − 1, and 1 on padding (docs/model.md, section 2.5).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from internvl_edge.errors import InternVLError, UsageError, shortened
from internvl_edge.runtime.text.padding import left_padded
from internvl_edge.types import Array

logger = logging.getLogger(__name__)


class Decoding(Protocol):
    """A decoder and its cache, wherever that lies."""

    def run(self, ids: Array, mask: Array, positions: Array) -> Array:
        """Read tokens; return the logits after the last one, float32 [B,V]. The cache grows.

        Args:
            ids: int64 [B,T].
            mask: int64 [B,P+T], of the cache and the tokens; 0 is padding.
            positions: int64 [B,T].
        """

    def run_all(self, ids: Array, mask: Array, positions: Array) -> Array:
        """Read tokens as ``run``; return the logits after each, float32 [B,T,V]."""

    @property
    def goes_back(self) -> bool:
        """True where the next tokens may overwrite the last ones; else those are masked."""

    @property
    def takes_drafts(self) -> bool:
        """True where there is room for tokens that are read and then forgotten."""

    def select(self, rows: Array) -> None:
        """Keep these rows of the cache, in this order; a row may be taken several times."""


MAX_BEAMS = 128  # of a row, each with a cache of its own
MAX_DRAFT = 64  # tokens
MAX_PENALTY = 50.0  # a length to this power is a number still
LARGEST = int(np.finfo(np.float64).max)  # a number that a float can hold
TOP_K = 50  # of do_sample=True, transformers' default


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """How to go on from a prompt.

    Raises:
        UsageError: a value that cannot be, or beams that are to be sampled.
    """

    max_new_tokens: int = 30
    min_new_tokens: int = 0  # stop ids have no chance before
    # Proposed at a time, as they followed the same tokens before (``drafts``); 0: none. Of one
    # greedy row, whose tokens are the same without.
    draft_tokens: int = 0
    max_time: float | None = None  # seconds, after which no token is begun; of one beam
    num_beams: int = 1
    length_penalty: float = 1.0  # of beams: above 0 longer sentences gain
    early_stopping: bool = False  # of beams
    temperature: float | None = None  # None: the largest logit, and so is 0
    top_k: int | None = None  # 0: of all
    top_p: float | None = None
    # As transformers has it. False: nothing is drawn, whatever the three above say. True: drawn,
    # among the TOP_K most likely unless top_k says otherwise. None: drawn where one is given.
    do_sample: bool | None = None
    # Above 1 what stands in the prompt or came before loses; None: as 1.
    repetition_penalty: float | None = None
    seed: int | None = None  # of what is drawn; None: another one each time
    stop_ids: tuple[int, ...] = (2,)
    pad_id: int = 0

    def __post_init__(self) -> None:
        _require_integer("max_new_tokens", self.max_new_tokens, 1)
        _require_integer("min_new_tokens", self.min_new_tokens, 0, self.max_new_tokens)
        _require_integer("num_beams", self.num_beams, 1, MAX_BEAMS)
        _require_integer("draft_tokens", self.draft_tokens, 0, MAX_DRAFT)
        penalty = self.length_penalty
        within = _is_number(penalty) and abs(penalty) <= MAX_PENALTY
        _require("length_penalty", penalty, within, f"{-MAX_PENALTY:g} to {MAX_PENALTY:g}")
        is_flag = isinstance(self.early_stopping, bool)
        _require("early_stopping", self.early_stopping, is_flag, "True or False")
        time = self.max_time
        is_time = time is None or (_is_number(time) and 0 < time < np.inf)
        _require("max_time", time, is_time, "a finite number of seconds above 0")
        heat, share = self.temperature, self.top_p
        is_warm = heat is None or (_is_number(heat) and 0 <= heat < np.inf)
        _require("temperature", heat, is_warm, "a finite number of at least 0")
        is_share = share is None or (_is_number(share) and 0 < share <= 1)
        _require("top_p", share, is_share, "more than 0, up to 1")
        if self.top_k is not None:
            _require_integer("top_k", self.top_k, 0)
        is_choice = self.do_sample is None or isinstance(self.do_sample, bool)
        _require("do_sample", self.do_sample, is_choice, "True, False or None")
        again = self.repetition_penalty
        is_factor = again is None or (_is_number(again) and 0 < again < np.inf)
        _require("repetition_penalty", again, is_factor, "a finite number above 0")
        if self.seed is not None:
            _require_integer("seed", self.seed, 0)
        _require("stop_ids", self.stop_ids, isinstance(self.stop_ids, tuple | list), "a tuple")
        for token in self.stop_ids:
            _require_integer("stop_ids", token, 0)
        _require_integer("pad_id", self.pad_id, 0)
        if self.is_sampled and self.num_beams > 1:
            raise UsageError(
                f"num_beams {self.num_beams}: beams are not drawn; leave temperature, top_k and "
                "top_p out, or take one beam"
            )
        if self.do_sample and heat == 0:
            raise UsageError("temperature 0: nothing is drawn then; leave do_sample out")

    @property
    def is_sampled(self) -> bool:
        """Whether tokens are drawn."""
        if self.do_sample is not None:
            return self.do_sample
        if self.temperature == 0:
            return False
        return (self.temperature, self.top_k, self.top_p) != (None, None, None)

    @property
    def candidates(self) -> int | None:
        """How many of the most likely tokens are drawn from; None: all."""
        if self.top_k is None and self.do_sample:
            return TOP_K
        return self.top_k or None


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """Rows of ids, and how many positions stand before them in the cache."""

    rows: Sequence[Sequence[int]]  # B, at least one id each
    past: int = 0  # P
    before: Sequence[Sequence[int]] = ()  # of each row, ids among those P; for repetition
    first: int = 0  # which row of a request its first one is, for what is drawn
    # Where the positions of long texts begin, and so the length of the longest short one; 0: all
    # texts have the same. See ``export.models.llama``.
    long_positions: int = 0


def _require(name: str, value: object, ok: bool, expected: str) -> None:
    if not ok:
        told = shortened(value, quoted=not isinstance(value, str))
        raise UsageError(f"{name} {told}: expected {expected}")


def _require_integer(name: str, value: Any, low: int, high: int | None = None) -> None:
    is_integer = isinstance(value, int | np.integer) and not isinstance(value, bool)
    _require(name, shortened(value), is_integer, f"an integer, found {type(value).__name__}")
    within = low <= value and (high is None or value <= high)
    _require(name, value, within, f"at least {low}" if high is None else f"{low} to {high}")


def _is_number(value: object) -> bool:
    if isinstance(value, int):
        return not isinstance(value, bool) and abs(value) <= LARGEST
    return isinstance(value, float | np.integer | np.floating)


class Batch:
    """Rows that are continued together: their mask and positions."""

    def __init__(self, decoding: Decoding, prompt: Prompt, room: int) -> None:
        self.decoding, self._past = decoding, prompt.past
        self._ids, mask = left_padded(prompt.rows)
        rows, length = mask.shape
        self.used = prompt.past + length
        self.mask = np.ones((rows, self.used + room), np.int64)
        self.mask[:, prompt.past : self.used] = mask
        count = self.mask[:, : self.used].sum(axis=1, keepdims=True)
        self._offset = _offsets(count + room - 1, prompt.long_positions)  # the last is not read
        self.next = count + self._offset  # (B, 1): position

    def read_prompt(self) -> Array:
        mask = np.ascontiguousarray(self.mask[:, : self.used])
        positions = np.where(mask > 0, mask.cumsum(axis=1) - 1, 1)[:, self._past :] + self._offset
        return self._run(self._ids, mask, np.ascontiguousarray(positions))

    def read(self, tokens: Array) -> Array:
        """Read one more token of every row (B,); return the logits (B, V)."""
        mask = self._widened(1)
        positions, self.next = self.next, self.next + 1
        return self._run(tokens[:, None], mask, positions)

    def read_draft(self, tokens: Sequence[int]) -> Array:
        """Read several more tokens of the only row; return the logits after each (T, V)."""
        mask, positions = self._widened(len(tokens)), self.next + np.arange(len(tokens))
        self.next = self.next + len(tokens)
        logits: Array = self.decoding.run_all(np.array([tokens], np.int64), mask, positions)[0]
        require_finite(logits, self.used)
        return logits

    def _widened(self, count: int) -> Array:
        """Return the mask of everything so far and of ``count`` tokens more."""
        self.used += count
        if self.used > self.mask.shape[1]:  # tokens that were forgotten keep their places
            self.mask = np.pad(self.mask, ((0, 0), (0, self.used)), constant_values=1)
        return np.ascontiguousarray(self.mask[:, : self.used])

    def forget(self, count: int) -> None:
        """Forget the last tokens that were read."""
        self.next = self.next - count
        if self.decoding.goes_back:
            self.used -= count
        else:
            self.mask[:, self.used - count : self.used] = 0

    def select(self, rows: Array) -> None:
        self.decoding.select(rows)
        self.mask, self.next = self.mask[rows], self.next[rows]

    def _run(self, ids: Array, mask: Array, positions: Array) -> Array:
        logits = self.decoding.run(ids, mask, positions)
        require_finite(logits, self.used)
        return logits


def require_finite(logits: Array, used: int) -> None:
    """Refuse logits (B, V) of which nothing can be chosen.

    Raises:
        InternVLError: NaN, or nothing that has a chance.
    """
    best = logits.max(axis=1)  # NaN where a row has any, infinite where nothing has a chance
    if not np.isfinite(best).all():
        rows = np.flatnonzero(~np.isfinite(best)).tolist()
        wrong = "NaN" if np.isnan(best).any() else "infinite logits"
        raise InternVLError(
            f"the decoder gave {wrong} after {used} positions, row {rows}: expected finite "
            "logits; run internvl-edge verify, or export at another precision"
        )


def offset_of(prompt: Prompt, how: Generation) -> int:
    """Return what is added to the positions of a prompt of one row; see ``Prompt``."""
    length = prompt.past + len(prompt.rows[0]) + how.max_new_tokens - 1  # the last is not read
    return int(_offsets(np.array([[length]]), prompt.long_positions)[0, 0])


def _offsets(lengths: Array, long_positions: int) -> Array:
    """Choose the positions of each row, by the number (B, 1) that it may come to; see ``Prompt``.

    A row keeps its choice to the end: what is cached was rotated by it.
    """
    is_long = (lengths > long_positions) & (long_positions > 0)
    if is_long.any():
        logger.warning(
            "%d of %d texts may have more than %d positions with their new tokens: they have the "
            "rotary positions of long texts (LongRoPE) from the beginning; ask for fewer new "
            "tokens to keep those of short ones",
            is_long.sum(),
            len(lengths),
            long_positions,
        )
    return is_long * np.int64(long_positions)


def without(logits: Array, ids: Array) -> Array:
    """Return logits (B, V) in which these ids have no chance; ids beyond V have none anyway."""
    logits = logits.copy()
    logits[:, ids[ids < logits.shape[1]]] = -np.inf
    return logits


class Repetition:
    """The tokens of each row so far, prompt and all, whose repetition is penalised.

    A score above 0 is divided by the penalty, one below multiplied, once however often the token
    stands there, as transformers' ``RepetitionPenaltyLogitsProcessor`` does; padding and places for
    image tokens are none.
    """

    def __init__(self, prompt: Prompt, penalty: float) -> None:
        self._penalty = np.float32(penalty)
        self._seen = [set(row) for row in prompt.rows]
        for seen, ids in zip(self._seen, prompt.before, strict=False):
            seen.update(ids)

    def penalised(self, scores: Array) -> Array:
        """Return scores (B, V), logits or log probabilities, with the penalty."""
        scores = scores.copy()
        for row, seen in zip(scores, self._seen, strict=True):
            ids = np.fromiter((token for token in seen if 0 <= token < len(row)), np.int64)
            some = row[ids]
            row[ids] = np.where(some < 0, some * self._penalty, some / self._penalty)
        return scores

    def add(self, tokens: Array) -> None:
        """Note the new token of every row, (B,)."""
        for seen, token in zip(self._seen, tokens.tolist(), strict=True):
            seen.add(token)

    def select(self, rows: Array) -> None:
        """Keep these rows, in this order; a row may be taken several times."""
        self._seen = [set(self._seen[row]) for row in rows.tolist()]


def repetition_of(prompt: Prompt, how: Generation) -> Repetition | None:
    """Return what penalises repetition, None where nothing does."""
    penalty = how.repetition_penalty
    return None if penalty in (None, 1) else Repetition(prompt, penalty)

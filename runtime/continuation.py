"""What every way of continuing a prompt shares: the options, the prompt, and its rows under way.

A prompt of T tokens is read at once, behind the P positions that the cache holds already (the
image's queries); from then on every call gives the decoder one token per row. Prompts are padded
on the left. The mask over everything so far is 1 where there is no padding, and a token's position
counts what is not padding before it: cumsum(mask) − 1, and 1 on padding (internvl-spec 2.4).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from internvl_edge.errors import InternVLError, UsageError
from internvl_edge.runtime.session import Array


class Decoding(Protocol):
    """A decoder and its cache, wherever that lies."""

    def run(self, ids: Array, mask: Array, positions: Array) -> Array:
        """Read tokens; the logits behind the last one, float32 [B,V]. The cache grows by them.

        Args:
            ids: int64 [B,T].
            mask: int64 [B,P+T], of the cache and the tokens; 0 is padding.
            positions: int64 [B,T].
        """

    def select(self, rows: Array) -> None:
        """Keep these rows of the cache, in this order; a row may be taken several times."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """How to go on from a prompt.

    Raises:
        UsageError: a number that cannot be, or beams that are to be sampled.
    """

    max_new_tokens: int = 30
    min_new_tokens: int = 0  # stop ids have no chance before
    num_beams: int = 1
    length_penalty: float = 1.0  # of beams: above 0 longer sentences gain
    early_stopping: bool = False  # of beams
    temperature: float | None = None  # None: the largest logit
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None  # of what is drawn; None: another one each time
    stop_ids: tuple[int, ...] = (2,)
    pad_id: int = 0

    def __post_init__(self) -> None:
        _require("max_new_tokens", self.max_new_tokens, self.max_new_tokens >= 1, "at least 1")
        within = 0 <= self.min_new_tokens <= self.max_new_tokens
        _require("min_new_tokens", self.min_new_tokens, within, f"0 to {self.max_new_tokens}")
        _require("num_beams", self.num_beams, self.num_beams >= 1, "at least 1")
        _require("top_k", self.top_k, self.top_k is None or self.top_k >= 1, "at least 1")
        is_share = self.top_p is None or 0 < self.top_p <= 1
        _require("top_p", self.top_p, is_share, "more than 0, up to 1")
        is_warm = self.temperature is None or 0 < self.temperature < np.inf
        _require("temperature", self.temperature, is_warm, "a finite number above 0")
        samples = (self.temperature, self.top_k, self.top_p) != (None, None, None)
        if samples and self.num_beams > 1:
            raise UsageError(
                f"num_beams {self.num_beams}: beams are not drawn; leave temperature, top_k and "
                "top_p out, or take one beam"
            )

    @property
    def is_sampled(self) -> bool:
        return (self.temperature, self.top_k, self.top_p) != (None, None, None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """Left-padded ids, and how many positions stand before them in the cache."""

    ids: Array  # int64 [B,T]
    mask: Array  # int64 [B,T], 0 is padding
    past: int = 0  # P


def _require(name: str, value: object, ok: bool, expected: str) -> None:
    if not ok:
        raise UsageError(f"{name} {value}: expected {expected}")


class Batch:
    """Rows that are continued together: their mask and positions."""

    def __init__(self, decoding: Decoding, prompt: Prompt, room: int) -> None:
        rows, length = prompt.ids.shape
        self.decoding, self.prompt = decoding, prompt
        self.mask = np.ones((rows, prompt.past + length + room), np.int64)
        self.mask[:, prompt.past : prompt.past + length] = prompt.mask
        self.used = prompt.past + length
        self.next = self.mask[:, : self.used].sum(axis=1, keepdims=True)  # (B, 1): position

    def read_prompt(self) -> Array:
        mask = np.ascontiguousarray(self.mask[:, : self.used])
        positions = np.where(mask > 0, mask.cumsum(axis=1) - 1, 1)[:, self.prompt.past :]
        return self._run(self.prompt.ids, mask, np.ascontiguousarray(positions))

    def read(self, tokens: Array) -> Array:
        """One more token of every row (B,) → logits (B, V)."""
        self.used += 1
        mask = np.ascontiguousarray(self.mask[:, : self.used])
        positions, self.next = self.next, self.next + 1
        return self._run(tokens[:, None], mask, positions)

    def select(self, rows: Array) -> None:
        self.decoding.select(rows)
        self.mask, self.next = self.mask[rows], self.next[rows]

    def _run(self, ids: Array, mask: Array, positions: Array) -> Array:
        logits = self.decoding.run(ids, mask, positions)
        if np.isnan(logits.max()):  # a maximum of anything and NaN is NaN
            rows = np.flatnonzero(np.isnan(logits).any(axis=1)).tolist()
            raise InternVLError(
                f"the decoder gave NaN behind {self.used} positions, row {rows}: expected finite "
                "logits; run internvl-edge verify, or export at another precision"
            )
        return logits


def without(logits: Array, ids: Array) -> Array:
    logits = logits.copy()
    logits[:, ids] = -np.inf
    return logits

"""Tokens one after the other on a decoder with a cache: greedy, sampled, or by beam search.

``batch`` says how a prompt is read, masked and counted, ``cache`` where its cache lies, ``beams``
what beam search is.

Greedy decoding takes the largest logit; sampling draws one from

    softmax(top_p(top_k(logits / temperature)))

in transformers' order, after its penalty on repetition (``batch.Repetition``). Top-k keeps the k
largest logits, and top-p the most likely tokens until their probabilities reach p. Every row draws
from a stream of its own, by the seed and its number in the request, so that nothing depends on how
many rows run together. A row that has met a stop id is filled with the padding id. Until
``min_new_tokens`` are there, stop ids have no chance.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from internvl_edge.errors import UsageError
from internvl_edge.runtime.generation.batch import (
    Batch,
    Decoding,
    Generation,
    Prompt,
    repetition_of,
    without,
)
from internvl_edge.runtime.generation.beams import beam_search
from internvl_edge.runtime.generation.drafts import Lookup
from internvl_edge.runtime.generation.largest import largest
from internvl_edge.types import Array

__all__ = ["Choice", "generate", "generate_all", "stream"]

COLDEST = float(np.finfo(np.float32).tiny)  # a temperature that logits can be divided by
FEW = 64  # of the most likely tokens, among which a nucleus is looked for first


def generate(decoding: Decoding, prompt: Prompt, how: Generation) -> Array:
    """Continue every row of a prompt.

    Returns:
        The new ids, int64 [B,N]: N is at most ``max_new_tokens``, rows are padded after the stop
        id that ends them.

    Raises:
        InternVLError: the decoder gave NaN, or nothing that has a chance.
    """
    if how.num_beams > 1:
        return beam_search(decoding, prompt, how)
    return np.stack(list(stream(decoding, prompt, how)), axis=1)


def generate_all(batches: Iterable[tuple[Decoding, Prompt]], how: Generation) -> Array:
    """Continue the batches of a request one after the other: int64 [B,N] of all rows."""
    parts = []
    for decoding, prompt in batches:
        parts.append(generate(decoding, prompt, how))
        del decoding, prompt  # the cache goes before the next batch takes one
    width = max(ids.shape[1] for ids in parts)
    return np.concatenate(
        [
            np.pad(ids, ((0, 0), (0, width - ids.shape[1])), constant_values=how.pad_id)
            for ids in parts
        ]
    )


def stream(decoding: Decoding, prompt: Prompt, how: Generation) -> Iterator[Array]:
    """Yield the next token of every row, int64 [B], as soon as it is known; greedy or sampled.

    Raises:
        UsageError: beams, of which nothing is known before the end.
        InternVLError: the decoder gave NaN, or nothing that has a chance.
    """
    if how.num_beams > 1:
        raise UsageError(f"num_beams {how.num_beams}: only one beam can be streamed")
    choice = Choice(prompt, how)
    batch = Batch(decoding, prompt, how.max_new_tokens)
    logits = batch.read_prompt()
    is_draftable = len(prompt.rows) == 1 and not how.is_sampled
    if how.draft_tokens and is_draftable and decoding.takes_drafts:
        yield from _drafted(batch, logits, choice, prompt, how)
        return
    while True:
        tokens = choice.of(logits)
        yield tokens
        if choice.is_over:
            return
        logits = batch.read(tokens)


def _drafted(
    batch: Batch, logits: Array, choice: Choice, prompt: Prompt, how: Generation
) -> Iterator[Array]:
    """Yield the tokens of one row, several after a call where a draft was right."""
    lookup = Lookup([*(prompt.before[0] if prompt.before else ()), *prompt.rows[0]])
    draft: list[int] = []  # that was read, and waits for its logits' word
    for count in range(how.max_new_tokens):
        at = len(logits) - 1 - len(draft)
        tokens = choice.of(logits[at : at + 1])
        token = int(tokens[0])
        yield tokens
        if choice.is_over:
            return
        lookup.add(token)
        if draft and draft[0] == token:
            del draft[0]
            continue
        if draft:
            batch.forget(len(draft))
        draft = lookup.propose(min(how.draft_tokens, how.max_new_tokens - count - 2))
        logits = batch.read_draft([token, *draft]) if draft else batch.read(tokens)


class Choice:
    """How the next token of every row is chosen, from its logits and what was chosen before.

    Args:
        prompt: that is continued.
        how: the options; their time begins now.
    """

    def __init__(self, prompt: Prompt, how: Generation) -> None:
        rows = len(prompt.rows)
        self._how, self._count = how, 0
        self._stop = np.array(how.stop_ids, np.int64)
        self._rngs = [_rng(how.seed, prompt.first + row) for row in range(rows)]
        self._alive = np.ones(rows, bool)
        self._repetition = repetition_of(prompt, how)
        self._end = math.inf if how.max_time is None else time.monotonic() + how.max_time

    def of(self, logits: Array) -> Array:
        """Choose the next token of every row (B,), of logits (B, V)."""
        how, repetition = self._how, self._repetition
        self._count += 1
        if repetition is not None:
            logits = repetition.penalised(logits)
        if self._count <= how.min_new_tokens:
            logits = without(logits, self._stop)
        best = _drawn(logits, how, self._rngs) if how.is_sampled else logits.argmax(axis=1)
        tokens = np.where(self._alive, best, how.pad_id)
        self._alive &= ~(tokens[:, None] == self._stop).any(axis=1)
        if repetition is not None:
            repetition.add(tokens)
        return tokens

    @property
    def is_late(self) -> bool:
        """True after the time that it may take."""
        return time.monotonic() >= self._end

    @property
    def is_over(self) -> bool:
        """True where every row has ended."""
        is_whole = self._count == self._how.max_new_tokens or not self._alive.any()
        return is_whole or self.is_late


# --- sampling ------------------------------------------------------------------------------------


def _rng(seed: int | None, row: int) -> np.random.Generator:
    return np.random.default_rng(None if seed is None else [seed, row])


def _drawn(logits: Array, how: Generation, rngs: Sequence[np.random.Generator]) -> Array:
    """Draw one token of each row, (B,)."""
    draws = zip(logits, rngs, strict=True)
    return np.array([_draw(row, how, rng.random()) for row, rng in draws], np.int64)


def _draw(logits: Array, how: Generation, point: float) -> int:
    """Find the token of logits (V,) at a point from 0 to 1."""
    ids = None  # all of them
    if how.candidates is not None and how.candidates < len(logits):
        ids = largest(logits, how.candidates)
    scores = logits if ids is None else logits[ids]
    heat = max(how.temperature or 1.0, COLDEST)
    with np.errstate(over="ignore"):  # in the cold all but the best are infinitely far below it
        chances = np.exp((scores - scores.max()) / heat)
    if how.top_p is not None and how.top_p < 1:
        kept = _nucleus(chances / chances.sum(), how.top_p)
        ids, chances = kept if ids is None else ids[kept], chances[kept]
    reached = chances.cumsum(dtype=np.float64)
    at = min(int(np.searchsorted(reached, point * reached[-1], side="right")), len(reached) - 1)
    return at if ids is None else int(ids[at])


def _nucleus(chances: Array, share: float) -> Array:
    """Find the most likely tokens, until their chances reach ``share``; one at least."""
    few = largest(chances, min(FEW, len(chances)))
    while chances[few].sum() < share and len(few) < len(chances):
        few = largest(chances, min(8 * len(few), len(chances)))
    order = few[np.argsort(-chances[few], kind="stable")]
    ranked = chances[order]
    before = ranked.cumsum(dtype=np.float64) - ranked
    return order[: int((before < share).sum())]

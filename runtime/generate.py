"""Tokens one after the other on a decoder with a cache: greedy, sampled, or by beam search.

How a prompt is read, masked and counted: ``continuation``. Where its cache lies: ``cache``. Beam
search: ``beams``.

Greedy decoding takes the largest logit; sampling draws one from

    softmax(top_p(top_k(logits / temperature)))

where top-k keeps the k largest logits, and top-p the most likely tokens until their probabilities
reach p. A row that has met a stop id is filled with the padding id. Until ``min_new_tokens`` are
there, stop ids have no chance.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from internvl_edge.errors import UsageError
from internvl_edge.runtime.beams import beam_search
from internvl_edge.runtime.continuation import Batch, Decoding, Generation, Prompt, without
from internvl_edge.runtime.session import Array

__all__ = ["Generation", "Prompt", "generate", "stream"]


def generate(decoding: Decoding, prompt: Prompt, how: Generation) -> Array:
    """Continue every row of a prompt.

    Returns:
        The new ids, int64 [B,N]: N is at most ``max_new_tokens``, rows are padded behind the stop
        id that ends them.

    Raises:
        InternVLError: the decoder gave NaN.
    """
    if how.num_beams > 1:
        return beam_search(decoding, prompt, how)
    return np.stack(list(stream(decoding, prompt, how)), axis=1)


def stream(decoding: Decoding, prompt: Prompt, how: Generation) -> Iterator[Array]:
    """The next token of every row, int64 [B], as soon as it is known; greedy or sampled.

    Raises:
        UsageError: beams, of which nothing is known before the end.
        InternVLError: the decoder gave NaN.
    """
    if how.num_beams > 1:
        raise UsageError(f"num_beams {how.num_beams}: only one beam can be streamed")
    batch = Batch(decoding, prompt, how.max_new_tokens)
    rng = np.random.default_rng(how.seed)
    stop = np.array(how.stop_ids, np.int64)
    logits = batch.read_prompt()
    alive = np.ones(len(logits), bool)
    for count in range(1, how.max_new_tokens + 1):
        if count <= how.min_new_tokens:
            logits = without(logits, stop)
        best = _drawn(logits, how, rng) if how.is_sampled else logits.argmax(axis=1)
        tokens = np.where(alive, best, how.pad_id)
        alive &= ~(tokens[:, None] == stop).any(axis=1)
        yield tokens
        if count == how.max_new_tokens or not alive.any():
            return
        logits = batch.read(tokens)


# --- sampling ------------------------------------------------------------------------------------


def _drawn(logits: Array, how: Generation, rng: np.random.Generator) -> Array:
    """One token of each row, (B,)."""
    scores = logits.astype(np.float64) / (how.temperature or 1.0)
    if how.top_k is not None and how.top_k < scores.shape[1]:
        kth = -np.partition(-scores, how.top_k - 1, axis=1)[:, how.top_k - 1 : how.top_k]
        scores = np.where(scores >= kth, scores, -np.inf)
    chances = np.exp(scores - scores.max(axis=1, keepdims=True))
    chances /= chances.sum(axis=1, keepdims=True)
    if how.top_p is not None:
        chances = _nucleus(chances, how.top_p)
    reached = chances.cumsum(axis=1)
    point = rng.random((len(reached), 1)) * reached[:, -1:]
    found: Array = (reached <= point).sum(axis=1)
    return found


def _nucleus(chances: Array, share: float) -> Array:
    """Only the most likely tokens, until their chances reach ``share``; the first one always."""
    order = np.argsort(-chances, axis=1, kind="stable")
    ranked = np.take_along_axis(chances, order, axis=1)
    before = ranked.cumsum(axis=1) - ranked
    kept = np.where((before < share) | (before == 0), ranked, 0.0)
    result = np.empty_like(chances)
    np.put_along_axis(result, order, kept, axis=1)
    return result

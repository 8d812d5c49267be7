"""Beam search with the original's exact semantics.

Beam search keeps the best n sentences under way, by the sum of their tokens' log
probabilities, and up to n finished ones, by that sum over length^``length_penalty``. Of the 2n best
continuations of a step, one that ends counts as finished if it is among the first n, and the first
n others go on. A row is done when no sentence under way can become better than the worst finished
one; its length is taken as it is now (``early_stopping`` False) or the row is done as soon as it
has n (True). A finished sentence's length counts its stop token. These are the semantics of
transformers 4.37.2, with which the published captions were made (docs/model.md, section 9).
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field

import numpy as np

from internvl_edge.runtime.generation.batch import (
    Batch,
    Decoding,
    Generation,
    Prompt,
    repetition_of,
    without,
)
from internvl_edge.runtime.generation.largest import largest
from internvl_edge.types import Array

IMPOSSIBLE = -1e9  # the sum of a beam that is a copy of another one, before the first step


@dataclass(slots=True)
class _Finished:
    """The best finished sentences of one row."""

    num_beams: int
    length_penalty: float
    # a heap: score, order of arrival, ids
    sentences: list[tuple[float, int, list[int]]] = field(default_factory=list)
    arrived: int = 0
    done: bool = False

    def add(self, ids: list[int], total: float, length: int) -> None:
        entry = total / length**self.length_penalty, self.arrived, ids
        self.arrived += 1
        if len(self.sentences) < self.num_beams:
            heapq.heappush(self.sentences, entry)
        elif entry[0] > self.sentences[0][0]:
            heapq.heapreplace(self.sentences, entry)

    def is_done(self, best_total: float, length: int, *, early: bool) -> bool:
        if len(self.sentences) < self.num_beams:
            return False
        return early or self.sentences[0][0] >= best_total / length**self.length_penalty

    def best(self) -> list[int]:
        return max(self.sentences)[2]


def beam_search(decoding: Decoding, prompt: Prompt, how: Generation) -> Array:
    """Find the best sentence after every row of a prompt, int64 [B,N]; see ``generate``."""
    rows, beams = len(prompt.rows), how.num_beams
    stop = np.array(how.stop_ids, np.int64)
    batch = Batch(decoding, prompt, how.max_new_tokens)
    logits = batch.read_prompt()
    expanded = np.repeat(np.arange(rows), beams)
    batch.select(expanded)
    logits = logits[expanded]
    totals = np.full((rows, beams), IMPOSSIBLE, np.float32)
    totals[:, 0] = 0
    ids: list[list[int]] = [[] for _ in expanded]
    finished = [_Finished(beams, how.length_penalty) for _ in range(rows)]
    repetition = repetition_of(prompt, how)
    if repetition is not None:
        repetition.select(expanded)
    for length in range(1, how.max_new_tokens + 1):
        barred = stop if length <= how.min_new_tokens else stop[:0]
        scores = logits if repetition is None else repetition.penalised(_log_softmax(logits))
        is_scored = repetition is not None
        origin, tokens, totals = _advance(
            scores, totals, barred, ids, finished, how, is_scored=is_scored
        )
        ids = [[*ids[row], int(token)] for row, token in zip(origin, tokens, strict=True)]
        if length == how.max_new_tokens or all(row.done for row in finished):
            break
        batch.select(origin)
        if repetition is not None:
            repetition.select(origin)
            repetition.add(tokens)
        logits = batch.read(tokens)
    return _best_sentences(finished, ids, totals, how)


def _advance(
    logits: Array,
    totals: Array,
    barred: Array,
    ids: list[list[int]],
    finished: list[_Finished],
    how: Generation,
    *,
    is_scored: bool,
) -> tuple[Array, Array, Array]:
    """Take one step with every row.

    Args:
        logits: (rows · beams, V), after every sentence under way.
        totals: (rows, beams), their sums.
        barred: token ids that have no chance.
        ids: of the sentences under way.
        finished: of every row; grows.
        how: the options.
        is_scored: the logits are log probabilities already, penalised.

    Returns:
        Of every sentence that goes on: the beam it came from, its token (both (rows · beams,)),
        and its sum (rows, beams).
    """
    beams, length = how.num_beams, len(ids[0]) + 1
    count = max(2, 1 + len(how.stop_ids)) * beams
    origin = np.arange(len(logits))
    tokens = np.full(len(logits), how.pad_id, np.int64)
    sums = np.zeros_like(totals)
    for row, done in enumerate(finished):
        if done.done:
            continue
        first = row * beams
        options = _best_next(
            logits[first : first + beams], totals[row], barred, count, is_scored=is_scored
        )
        going = 0
        for rank, (beam, token, total) in enumerate(options):
            if token in how.stop_ids:
                if rank < beams:
                    done.add([*ids[first + beam], token], total, length)
                continue
            place = first + going
            origin[place], tokens[place], sums[row, going] = first + beam, token, total
            going += 1
            if going == beams:
                break
        done.done = done.is_done(options[0][2], length, early=how.early_stopping)
    return origin, tokens, sums


def _best_next(
    logits: Array, totals: Array, barred: Array, count: int, *, is_scored: bool = False
) -> list[tuple[int, int, float]]:
    """Find the best continuations of one row's sentences: beam, token and sum, best first.

    Of equal ones, the first beam and the lowest token. Whatever is among the best of all is among
    the best of its beam, so that only these are scored: log_softmax(logits) + total.
    """
    peak = logits.max(axis=1)  # (beams,)
    spread = np.log(np.exp(logits - peak[:, None]).sum(axis=1))
    if is_scored:  # log probabilities, whose sum is 1 no longer
        peak, spread = np.zeros_like(peak), np.zeros_like(spread)
    if len(barred):
        logits = without(logits, barred)
    candidates = [largest(row, min(count, len(row))) for row in logits]
    beam = np.repeat(np.arange(len(logits)), [len(some) for some in candidates])
    token = np.concatenate(candidates)
    sums = logits[beam, token] - peak[beam] - spread[beam] + totals[beam]
    best = np.argsort(-sums, kind="stable")[:count]
    return list(zip(beam[best].tolist(), token[best].tolist(), sums[best].tolist(), strict=True))


def _log_softmax(logits: Array) -> Array:
    shifted = logits - logits.max(axis=1, keepdims=True)
    result: Array = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result


def _best_sentences(
    finished: list[_Finished], ids: list[list[int]], totals: Array, how: Generation
) -> Array:
    """Choose the best sentence of each row, (rows, N); those under way count as they are."""
    best = []
    for row, done in enumerate(finished):
        if not done.done:
            for beam, total in enumerate(totals[row].tolist()):
                sentence = ids[row * how.num_beams + beam]
                done.add(sentence, total, len(sentence))
        best.append(done.best())
    width = max(map(len, best))
    return np.array([row + [how.pad_id] * (width - len(row)) for row in best], np.int64)

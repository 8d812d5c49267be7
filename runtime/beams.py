"""Beam search with the original's exact semantics.

Beam search keeps the best n sentences under way, by the sum of their tokens' log
probabilities, and up to n finished ones, by that sum over length^``length_penalty``. Of the 2n best
continuations of a step, one that ends counts as finished if it is among the first n, and the first
n others go on. A row is done when no sentence under way can become better than the worst finished
one; its length is taken as it is now (``early_stopping`` False) or the row is done as soon as it
has n (True). A finished sentence's length counts its stop token. These are the semantics of
transformers 4.37.2, with which the published captions were made (sections 2.5 and 3.5).
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field

import numpy as np

from internvl_edge.runtime.continuation import Batch, Decoding, Generation, Prompt, without
from internvl_edge.runtime.session import Array

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
    """The best sentence behind every row of a prompt, int64 [B,N]; see ``generate``."""
    rows, beams = len(prompt.ids), how.num_beams
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
    for length in range(1, how.max_new_tokens + 1):
        scores = _log_softmax(logits)
        if length <= how.min_new_tokens:
            scores = without(scores, stop)
        scores = scores + totals.reshape(-1, 1)
        origin, tokens, totals = _advance(scores, ids, finished, length, how)
        ids = [[*ids[row], int(token)] for row, token in zip(origin, tokens, strict=True)]
        if length == how.max_new_tokens or all(row.done for row in finished):
            break
        batch.select(origin)
        logits = batch.read(tokens)
    return _best_sentences(finished, ids, totals, how)


def _advance(
    scores: Array, ids: list[list[int]], finished: list[_Finished], length: int, how: Generation
) -> tuple[Array, Array, Array]:
    """One step of every row.

    Args:
        scores: (rows · beams, V), of every sentence under way with every next token.
        ids: of the sentences under way.
        finished: of every row; grows.
        length: tokens with the next one.
        how: the options.

    Returns:
        Of every sentence that goes on: the beam it came from, its token (both (rows · beams,)),
        and its sum (rows, beams).
    """
    beams, vocabulary = how.num_beams, scores.shape[1]
    count = max(2, 1 + len(how.stop_ids)) * beams
    origin = np.arange(len(scores))
    tokens = np.full(len(scores), how.pad_id, np.int64)
    totals = np.zeros((len(finished), beams), np.float32)
    for row, done in enumerate(finished):
        if done.done:
            continue
        flat = scores[row * beams : (row + 1) * beams].reshape(-1)
        candidates = _largest(flat, count)
        going = 0
        for rank, candidate in enumerate(candidates.tolist()):
            beam, token = row * beams + candidate // vocabulary, candidate % vocabulary
            total = float(flat[candidate])
            if token in how.stop_ids:
                if rank < beams:
                    done.add([*ids[beam], token], total, length)
                continue
            place = row * beams + going
            origin[place], tokens[place], totals[row, going] = beam, token, total
            going += 1
            if going == beams:
                break
        best = float(flat[candidates[0]])
        done.done = done.is_done(best, length, early=how.early_stopping)
    return origin, tokens, totals


def _best_sentences(
    finished: list[_Finished], ids: list[list[int]], totals: Array, how: Generation
) -> Array:
    """The best sentence of each row, (rows, N); those under way count as they are."""
    best = []
    for row, done in enumerate(finished):
        if not done.done:
            for beam, total in enumerate(totals[row].tolist()):
                sentence = ids[row * how.num_beams + beam]
                done.add(sentence, total, len(sentence))
        best.append(done.best())
    width = max(map(len, best))
    return np.array([row + [how.pad_id] * (width - len(row)) for row in best], np.int64)


def _largest(values: Array, count: int) -> Array:
    """Indices of the largest values, best first; of equal ones, the first."""
    count = min(count, len(values))
    found = np.argpartition(-values, count - 1)[:count]
    return found[np.lexsort((found, -values[found]))]


def _log_softmax(logits: Array) -> Array:
    shifted = logits - logits.max(axis=1, keepdims=True)
    result: Array = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result

"""Tokens one after the other: greedy, sampled, or by beam search, on a decoder with a cache.

A prompt of T tokens is read at once, behind the P positions that the cache holds already (the
image's queries); from then on every call gives the decoder one token per row. Prompts are padded
on the left. The mask over everything so far is 1 where there is no padding, and a token's position
counts what is not padding before it: cumsum(mask) − 1, and 1 on padding (internvl-spec 2.4).

**Greedy and sampled.** The next token is the largest logit, or one drawn from

    softmax(top_p(top_k(logits / temperature)))

where top-k keeps the k largest logits, and top-p the most likely tokens until their probabilities
reach p. A row that has met a stop id is filled with the padding id. Until ``min_new_tokens`` are
there, stop ids have no chance.

**Beam search** keeps the best n sentences under way, by the sum of their tokens' log
probabilities, and up to n finished ones, by that sum over length^``length_penalty``. Of the 2n best
continuations of a step, one that ends counts as finished if it is among the first n, and the first
n others go on. A row is done when no sentence under way can become better than the worst finished
one; its length is taken as it is now (``early_stopping`` False) or the row is done as soon as it
has n (True). A finished sentence's length counts its stop token. These are the semantics of
transformers 4.37.2, with which the published captions were made (sections 2.5 and 3.5).
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import numpy as np

from internvl_edge.errors import InternVLError, UsageError
from internvl_edge.runtime.session import Array, Session

__all__ = ["Decoding", "Generation", "HostDecoding", "Prompt", "generate", "start", "stream"]

PAST = "past_key_values."
IMPOSSIBLE = -1e9  # the sum of a beam that is a copy of another one, before the first step


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


def generate(decoding: Decoding, prompt: Prompt, how: Generation) -> Array:
    """Continue every row of a prompt.

    Returns:
        The new ids, int64 [B,N]: N is at most ``max_new_tokens``, rows are padded behind the stop
        id that ends them.

    Raises:
        InternVLError: the decoder gave NaN.
    """
    if how.num_beams > 1:
        return _beam_search(decoding, prompt, how)
    return np.stack(list(stream(decoding, prompt, how)), axis=1)


def stream(decoding: Decoding, prompt: Prompt, how: Generation) -> Iterator[Array]:
    """The next token of every row, int64 [B], as soon as it is known; greedy or sampled.

    Raises:
        UsageError: beams, of which nothing is known before the end.
        InternVLError: the decoder gave NaN.
    """
    if how.num_beams > 1:
        raise UsageError(f"num_beams {how.num_beams}: only one beam can be streamed")
    batch = _Batch(decoding, prompt, how.max_new_tokens)
    rng = np.random.default_rng(how.seed)
    stop = np.array(how.stop_ids, np.int64)
    logits = batch.read_prompt()
    alive = np.ones(len(logits), bool)
    for count in range(1, how.max_new_tokens + 1):
        if count <= how.min_new_tokens:
            logits = _without(logits, stop)
        best = _drawn(logits, how, rng) if how.is_sampled else logits.argmax(axis=1)
        tokens = np.where(alive, best, how.pad_id)
        alive &= ~(tokens[:, None] == stop).any(axis=1)
        yield tokens
        if count == how.max_new_tokens or not alive.any():
            return
        logits = batch.read(tokens)


class _Batch:
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


def _without(logits: Array, ids: Array) -> Array:
    logits = logits.copy()
    logits[:, ids] = -np.inf
    return logits


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


# --- beam search ---------------------------------------------------------------------------------


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


def _beam_search(decoding: Decoding, prompt: Prompt, how: Generation) -> Array:
    rows, beams = len(prompt.ids), how.num_beams
    stop = np.array(how.stop_ids, np.int64)
    batch = _Batch(decoding, prompt, how.max_new_tokens)
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
            scores = _without(scores, stop)
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


# --- the cache -----------------------------------------------------------------------------------


class Device(Protocol):
    """A session that leaves what it computed where it computed it; see ``OrtSession``."""

    def run_device(self, feeds: Mapping[str, Any], *, check: bool) -> dict[str, Any]: ...
    def step(
        self, feeds: Mapping[str, Array], names: Sequence[str], cache: Sequence[Any]
    ) -> tuple[Array, list[Any]]: ...


def start(session: Session, cache: Mapping[str, Array]) -> Decoding:
    """A decoder's session on a cache.

    Args:
        session: of a ``decoder``.
        cache: what ``image_queries`` gave as ``present.{i}.key`` and ``.value``, [B,heads,P,d].
    """
    past = {name.replace("present.", PAST, 1): values for name, values in cache.items()}
    if hasattr(session, "run_device") and hasattr(session, "step"):
        return DeviceDecoding(cast(Device, session), past)
    return HostDecoding(session, past)


class HostDecoding:
    """Any session; the cache goes in and comes out as arrays."""

    def __init__(self, session: Session, past: Mapping[str, Array]) -> None:
        self._session, self._past = session, dict(past)

    def run(self, ids: Array, mask: Array, positions: Array) -> Array:
        feeds = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, **self._past}
        found = self._session.run(feeds, check=False)
        logits: Array = found.pop("logits")[:, -1]
        self._past = {name.replace("present.", PAST, 1): found[name] for name in found}
        return logits

    def select(self, rows: Array) -> None:
        self._past = {name: values[rows] for name, values in self._past.items()}


class DeviceDecoding:
    """A session whose outputs stay on its device; what a step leaves is what the next one reads.

    What comes from outside, or passed through the host, is checked as any feed is.
    """

    def __init__(self, session: Device, past: Mapping[str, Any]) -> None:
        self._session, self._names, self._cache = session, list(past), list(past.values())
        self._is_there = False  # on the device

    def run(self, ids: Array, mask: Array, positions: Array) -> Array:
        feeds = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        if self._is_there:
            logits, self._cache = self._session.step(feeds, self._names, self._cache)
        else:
            past = dict(zip(self._names, self._cache, strict=True))
            found = self._session.run_device({**feeds, **past}, check=False)
            logits = found["logits"].numpy()
            self._names = [name.replace("present.", PAST, 1) for name in found if name != "logits"]
            self._cache = [value for name, value in found.items() if name != "logits"]
            self._is_there = True
        last: Array = logits[:, -1]
        return last

    def select(self, rows: Array) -> None:
        """Rows pass through the host, where they are others than before."""
        host = [v if isinstance(v, np.ndarray) else v.numpy() for v in self._cache]
        if len(rows) != len(host[0]) or (rows != np.arange(len(rows))).any():
            self._cache, self._is_there = [values[rows] for values in host], False


def cache_rows(cache: Mapping[str, Array], rows: Sequence[int]) -> dict[str, Array]:
    """Some rows of a cache, of which one may be taken several times."""
    chosen = np.asarray(rows)
    return {name: values[chosen] for name, values in cache.items()}

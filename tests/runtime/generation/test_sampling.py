"""Options of sampling, compared with transformers' logits processors."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from internvl_edge.runtime.generation.batch import Generation, Prompt, Repetition
from internvl_edge.runtime.generation.loop import _draw, generate
from internvl_edge.types import Array

VOCABULARY = 40


@pytest.fixture(scope="module")
def processors() -> Any:
    torch = pytest.importorskip("torch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("transformers")
        from transformers.generation import logits_process
    return torch, logits_process


def logits_of(history: list[int]) -> Array:
    rng = np.random.default_rng([5, *history])
    return (3 * rng.standard_normal(VOCABULARY)).astype(np.float32)


class Decoder:
    """Logits that follow from a row's tokens alone."""

    def __init__(self, rows: int) -> None:
        self.rows: list[list[int]] = [[] for _ in range(rows)]

    def run(self, ids: Array, mask: Array, positions: Array) -> Array:
        for row, new, seen in zip(self.rows, ids, mask[:, -ids.shape[1] :] > 0, strict=True):
            row.extend(new[seen].tolist())
        return np.stack([logits_of(row) for row in self.rows])

    def select(self, rows: Array) -> None:
        self.rows = [list(self.rows[row]) for row in rows]


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=9),
    st.floats(0.2, 5.0),
)
def test_the_penalty_is_transformers(processors: Any, ids: list[int], penalty: float) -> None:
    torch, process = processors
    logits = logits_of(ids)[None]
    processor = process.RepetitionPenaltyLogitsProcessor(penalty)
    expected = processor(torch.tensor([ids]), torch.from_numpy(logits.copy())).numpy()
    found = Repetition(Prompt(rows=[ids]), penalty).penalised(logits)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize(
    "how",
    [
        {"temperature": 0.7},
        {"top_k": 5},
        {"top_p": 0.8},
        {"temperature": 1.7, "top_k": 12, "top_p": 0.9},
        {"temperature": 0.3, "top_p": 0.5},
        {"top_k": 0, "temperature": 1.0},
        {"do_sample": True},
        {"do_sample": True, "top_k": 3, "temperature": 0.5},
    ],
    ids=str,
)
def test_tokens_are_drawn_as_transformers_draws_them(processors: Any, how: dict[str, Any]) -> None:
    torch, process = processors
    scores = torch.from_numpy(logits_of([1])[None])
    if how.get("temperature", 1.0) != 1.0:
        scores = process.TemperatureLogitsWarper(how["temperature"])(None, scores)
    top_k = how.get("top_k", 50 if how.get("do_sample") else 0)
    if top_k:
        scores = process.TopKLogitsWarper(top_k)(None, scores)
    if "top_p" in how:
        scores = process.TopPLogitsWarper(how["top_p"])(None, scores)
    expected = torch.softmax(scores, -1)[0].numpy()
    generation, count = Generation(**how), 4000
    assert generation.is_sampled
    points = (np.arange(count) + 0.5) / count
    tokens = [_draw(logits_of([1]), generation, point) for point in points]
    found = np.bincount(tokens, minlength=VOCABULARY) / count
    np.testing.assert_allclose(found, expected, atol=1.5 / count)


@pytest.mark.parametrize(
    ("how", "drawn"),
    [
        ({}, False),
        ({"temperature": 0}, False),
        ({"temperature": 0, "top_k": 5}, False),
        ({"temperature": 0.7, "do_sample": False}, False),
        ({"temperature": 0.7}, True),
        ({"top_p": 0.9}, True),
        ({"do_sample": True}, True),
    ],
    ids=str,
)
def test_what_is_drawn(how: dict[str, Any], drawn: bool) -> None:
    generation = Generation(max_new_tokens=5, seed=1, stop_ids=(), **how)
    assert generation.is_sampled is drawn
    if not drawn:
        greedy = Generation(max_new_tokens=5, stop_ids=())
        prompt = Prompt(rows=[[3], [4, 5]])
        found = generate(Decoder(2), prompt, generation)
        np.testing.assert_array_equal(found, generate(Decoder(2), prompt, greedy))


def greedy(ids: list[int], penalty: float, count: int) -> list[int]:
    """The likeliest token again and again, with the penalty spelled out."""
    ids = list(ids)
    for _ in range(count):
        scores = logits_of(ids)
        for token in set(ids):
            scores[token] = (
                scores[token] * penalty if scores[token] < 0 else scores[token] / penalty
            )
        ids.append(int(scores.argmax()))
    return ids[-count:]


def beams(ids: list[int], penalty: float, count: int, width: int) -> list[int]:
    """Every continuation of every sentence, the best kept, until they are long enough."""
    under_way = [(0.0, list(ids))]
    for _ in range(count):
        options = []
        for total, sentence in under_way:
            scores = logits_of(sentence).astype(np.float64)
            scores -= np.log(np.exp(scores).sum())
            for token in set(sentence):
                scores[token] *= penalty  # a log probability is below 0
            options += [(total + scores[t], [*sentence, t]) for t in range(VOCABULARY)]
        under_way = sorted(options, key=lambda option: -option[0])[:width]
    return under_way[0][1][-count:]


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 39), min_size=1, max_size=4), min_size=1, max_size=3),
    st.sampled_from([0.6, 1.3, 4.0]),
)
def test_rows_are_penalised_by_their_own_tokens(rows: list[list[int]], penalty: float) -> None:
    how: dict[str, Any] = {
        "max_new_tokens": 6,
        "repetition_penalty": penalty,
        "stop_ids": (),
    }
    found = generate(Decoder(len(rows)), Prompt(rows=rows), Generation(**how))
    assert found.tolist() == [greedy(row, penalty, 6) for row in rows]
    found = generate(Decoder(len(rows)), Prompt(rows=rows), Generation(num_beams=3, **how))
    assert found.tolist() == [beams(row, penalty, 6, 3) for row in rows]


def test_places_for_image_tokens_are_not_penalised() -> None:
    scores = np.ones((1, 4), np.float32)
    found = Repetition(Prompt(rows=[[-1, 2, 9]]), 2.0).penalised(scores)
    assert found.tolist() == [[1, 1, 0.5, 1]]
    assert scores.tolist() == [[1, 1, 1, 1]]

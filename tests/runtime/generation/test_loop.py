"""Generation against the original's ids, and against a plain search that knows no cache."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.chat.generation import COMPONENTS, Compiled, on_host
from support.checkpoints import TINY, write_internvl

from internvl_edge import compiler
from internvl_edge.compiler import ExportOptions
from internvl_edge.errors import FeedError, InternVLError, UsageError
from internvl_edge.export.checkpoint.load import load_reference
from internvl_edge.runtime.generation.batch import Generation, Prompt, repetition_of
from internvl_edge.runtime.generation.beams import _best_next
from internvl_edge.runtime.generation.cache import start
from internvl_edge.runtime.generation.largest import largest
from internvl_edge.runtime.generation.loop import _nucleus, generate, stream
from internvl_edge.types import Array

pytestmark = pytest.mark.slow

VOCABULARY, EOS = 7, 2


# --- the original's ids --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def original(golden: Path, tmp_path_factory: Any) -> tuple[Compiled, dict[str, Array]]:
    out = tmp_path_factory.mktemp("golden") / "out"
    checkpoint = golden / "tiny" / "checkpoint"
    compiler.export(ExportOptions(checkpoint=checkpoint, out=out, components=COMPONENTS))
    with np.load(golden / "tiny" / "reference.npz") as file:
        return Compiled(out), {name: file[name] for name in file.files}


@pytest.mark.parametrize("begin", [start, on_host])
@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("greedy_max12", {"max_new_tokens": 12}),
        ("greedy_min8_max12", {"max_new_tokens": 12, "min_new_tokens": 8}),
        ("greedy_leftpad_max12", {"max_new_tokens": 12}),
    ],
)
def test_greedy_is_the_originals(original: Any, begin: Any, name: str, how: Any) -> None:
    compiled, ref = original
    padded = "_leftpad" if "leftpad" in name else ""
    ids = ref[f"in.prompt_ids{padded}"]
    mask = ref["in.prompt_mask_leftpad"] if padded else np.ones_like(ids)
    rows = [row[kept > 0].tolist() for row, kept in zip(ids, mask, strict=True)]
    cache = compiled.cache(ref["in.pixel_values"])
    decoding = begin(compiled.decoder, cache)
    found = generate(decoding, Prompt(rows=rows, past=8), Generation(**how))
    np.testing.assert_array_equal(found, ref[f"gen.{name}"][:, 1:])  # after the leading BOS


@pytest.mark.parametrize("begin", [start, on_host])
@pytest.mark.parametrize("taken", ["one by one", "together", "the last before the first"])
def test_beams_are_the_originals(original: Any, begin: Any, taken: str) -> None:
    """One by one as the original, and together."""
    compiled, ref = original
    count = len(ref["in.prompt_ids"])
    batches = {
        "one by one": [[row] for row in range(count)],
        "together": [list(range(count))],
        "the last before the first": [[count - 1, 0]],
    }
    for rows in batches[taken]:
        ids = ref["in.prompt_ids"][rows]
        decoding = begin(compiled.decoder, compiled.cache(ref["in.pixel_values"][rows]))
        how = Generation(num_beams=5, min_new_tokens=8, max_new_tokens=30)
        found = generate(decoding, Prompt(rows=ids.tolist(), past=8), how)
        for row, ids_found in zip(rows, found, strict=True):
            expected = ref[f"gen.beam5_min8_max30.row{row}"][0, 1:]
            np.testing.assert_array_equal(ids_found[: len(expected)], expected)
            assert not ids_found[len(expected) :].any()


def test_unseen_weights_match_the_reference(tmp_path: Path) -> None:
    """Greedy ids of another checkpoint, left-padded, against PyTorch."""
    import torch

    checkpoint = write_internvl(tmp_path / "checkpoint", seed=7).path
    compiler.export(
        ExportOptions(checkpoint=checkpoint, out=tmp_path / "out", components=COMPONENTS)
    )
    compiled = Compiled(tmp_path / "out")
    model: Any = load_reference(checkpoint)
    rng = np.random.default_rng(5)
    pixels = rng.standard_normal((3, 3, 28, 28)).astype(np.float32)
    ids = rng.integers(3, 300, (3, 6))
    mask = np.ones_like(ids)
    mask[1, :4] = ids[1, :4] = 0
    expected = model.generate(*map(torch.from_numpy, (pixels, ids, mask)), 20, 5).numpy()
    rows = [row[row > 0].tolist() for row in ids]
    prompt = Prompt(rows=rows, past=TINY.num_query_token)
    how = Generation(max_new_tokens=20, min_new_tokens=5)
    found = generate(start(compiled.decoder, compiled.cache(pixels)), prompt, how)
    np.testing.assert_array_equal(found, expected)


def test_the_loop_costs_little(original: Any) -> None:
    """Per token, over ONNX Runtime's own call at batch 1: this thread's time on the processor.

    The target is 100 µs; the least is compared, as other work on the machine makes it more.
    """
    compiled, ref = original
    cache = compiled.cache(ref["in.pixel_values"][:1])
    inner, calls = compiled.decoder._session, []

    class Timed:
        def __getattr__(self, name: str) -> Any:
            return getattr(inner, name)

        def run_with_iobinding(self, binding: Any) -> None:
            started = time.thread_time()
            inner.run_with_iobinding(binding)
            calls.append(time.thread_time() - started)

    compiled.decoder._session = Timed()
    try:
        ids = ref["in.prompt_ids"][:1]
        prompt = Prompt(rows=ids.tolist(), past=8)
        how = Generation(max_new_tokens=100, min_new_tokens=100)
        over, started = [], time.thread_time()
        for _ in stream(start(compiled.decoder, cache), prompt, how):
            now = time.thread_time()
            over.append(now - started - calls[-1])
            started = now
    finally:
        compiled.decoder._session = inner
    assert min(over) < 300e-6


def test_a_cache_of_something_else_is_refused(original: Any) -> None:
    compiled, _ = original
    with pytest.raises(FeedError, match="expected the inputs"):
        decoding = start(compiled.decoder, {"present.0.key": np.zeros((1, 4, 8, 16), np.float32)})
        generate(decoding, toy_prompt([[3]]), Generation())


# --- a language that follows from its history ----------------------------------------------------


class Toy:
    """Logits that follow from a row's tokens alone; what the tests look at is recorded."""

    def __init__(
        self, rows: int, *, eos: float = 0.0, broken: tuple[int, Any, float] | None = None
    ) -> None:
        self.past: list[list[int]] = [[] for _ in range(rows)]
        self.eos, self.calls = eos, 0
        self.broken = broken  # the call, the token, and what it has in the last row
        self.positions: list[Array] = []

    def run(self, ids: Array, mask: Array, positions: Array) -> Array:
        assert mask.shape == (len(self.past), mask.shape[1])
        self.calls += 1
        self.positions.append(positions.copy())
        width = ids.shape[1]
        for row, new in enumerate(ids):
            seen = mask[row, -width:] > 0
            self.past[row] = [*self.past[row], *new[seen].tolist()]
        logits = np.stack([toy_logits(history, self.eos) for history in self.past])
        if self.broken is not None and self.calls == self.broken[0]:
            logits[-1, self.broken[1]] = self.broken[2]
        return logits

    def select(self, rows: Array) -> None:
        self.past = [list(self.past[row]) for row in rows]


def toy_logits(history: list[int], eos: float = 0.0) -> Array:
    rng = np.random.default_rng([17, *history])
    logits = 2 * rng.standard_normal(VOCABULARY)
    logits[EOS] += eos
    return logits.astype(np.float32)


def toy_prompt(rows: list[list[int]]) -> Prompt:
    return Prompt(rows=rows)


def plain_beam_search(prompt: list[int], how: Generation) -> list[int]:
    """The same search on lists, written from the description of the original's."""
    live: list[tuple[float, list[int]]] = [(0.0, [])]
    ended: list[tuple[float, list[int]]] = []
    is_done = False
    for length in range(1, how.max_new_tokens + 1):
        options = []
        for total, sentence in live:
            logits = toy_logits([*prompt, *sentence]).astype(np.float64)
            chances = logits - math.log(np.exp(logits).sum())
            for token, chance in enumerate(chances):
                if token == EOS and length <= how.min_new_tokens:
                    continue
                options.append((total + float(chance), [*sentence, token]))
        options.sort(key=lambda option: -option[0])
        best, live = options[0][0], []
        for rank, (total, sentence) in enumerate(options[: 2 * how.num_beams]):
            if sentence[-1] != EOS:
                live.append((total, sentence))
            elif rank < how.num_beams:
                ended.append((total / length**how.length_penalty, sentence))
                ended = sorted(ended, key=lambda e: -e[0])[: how.num_beams]
            if len(live) == how.num_beams:
                break
        if len(ended) == how.num_beams and (
            how.early_stopping or ended[-1][0] >= best / length**how.length_penalty
        ):
            is_done = True
            break
    if not is_done:
        ended += [(total / len(s) ** how.length_penalty, s) for total, s in live]
    return max(ended, key=lambda e: e[0])[1]


prompts = st.lists(
    st.lists(st.integers(3, VOCABULARY - 1), min_size=1, max_size=4), min_size=1, max_size=3
)


@settings(max_examples=60, deadline=None)
@given(
    prompts,
    st.integers(2, 3),
    st.integers(0, 4),
    st.integers(4, 8),
    st.sampled_from([0.0, 0.6, 1.0, 2.0]),
    st.booleans(),
)
def test_beam_search_is_the_plain_one(
    rows: list[list[int]], beams: int, low: int, high: int, penalty: float, early: bool
) -> None:
    how = Generation(
        num_beams=beams,
        min_new_tokens=low,
        max_new_tokens=high,
        length_penalty=penalty,
        early_stopping=early,
    )
    found = generate(Toy(len(rows)), toy_prompt(rows), how)
    for row, ids in zip(rows, found, strict=True):
        expected = plain_beam_search(row, how)
        assert ids[: len(expected)].tolist() == expected
        assert not ids[len(expected) :].any()


@settings(max_examples=40, deadline=None)
@given(prompts, st.integers(1, 9))
def test_greedy_rows_do_not_know_each_other(rows: list[list[int]], high: int) -> None:
    how = Generation(max_new_tokens=high)
    found = generate(Toy(len(rows)), toy_prompt(rows), how)
    for row, ids in zip(rows, found, strict=True):
        expected: list[int] = []
        while len(expected) < high and EOS not in expected:
            expected.append(int(toy_logits([*row, *expected]).argmax()))
        assert ids[: len(expected)].tolist() == expected
        assert not ids[len(expected) :].any()


def test_positions_count_what_is_not_padding() -> None:
    toy = Toy(2, eos=-99)
    prompt = toy_prompt([[3, 4, 5], [6]])
    generate(toy, replace(prompt, past=4), Generation(max_new_tokens=3))
    assert toy.positions[0].tolist() == [[4, 5, 6], [1, 1, 4]]
    assert [p.ravel().tolist() for p in toy.positions[1:]] == [[7, 5], [8, 6]]


def test_a_long_row_has_its_own_positions(caplog: pytest.LogCaptureFixture) -> None:
    """Five of the first and four of the second are read: with 4 the first alone is long."""
    toy = Toy(2, eos=-99)
    prompt = replace(toy_prompt([[3, 4, 5], [6, 7]]), long_positions=4)
    generate(toy, prompt, Generation(max_new_tokens=3))
    assert toy.positions[0].tolist() == [[4, 5, 6], [1, 0, 1]]
    assert [p.ravel().tolist() for p in toy.positions[1:]] == [[7, 2], [8, 3]]
    assert "1 of 2 texts may have more than 4 positions" in caplog.text
    beams = Toy(2, eos=-99)
    generate(beams, prompt, Generation(max_new_tokens=3, num_beams=2))
    assert [p.ravel().tolist() for p in beams.positions[1:]] == [[7, 7, 2, 2], [8, 8, 3, 3]]


def test_min_and_stop_and_never_ending() -> None:
    prompt = toy_prompt([[3]])
    ends = generate(Toy(1, eos=99), prompt, Generation())
    assert ends.tolist() == [[EOS]]
    later = generate(Toy(1, eos=99), prompt, Generation(min_new_tokens=3))
    assert later.shape == (1, 4)
    assert later[0, -1] == EOS not in later[0, :-1]
    never = generate(Toy(1, eos=-99), prompt, Generation(max_new_tokens=9))
    assert never.shape == (1, 9)
    beams = generate(Toy(1, eos=-99), prompt, Generation(max_new_tokens=9, num_beams=3))
    assert beams.shape == (1, 9)
    first = int(toy_logits([3], -99).argmax())
    stopped = generate(Toy(1, eos=-99), prompt, Generation(stop_ids=(first, EOS)))
    assert stopped.tolist() == [[first]]


def test_a_stream_runs_no_further_than_it_is_read() -> None:
    toy = Toy(1, eos=-99)
    tokens = stream(toy, toy_prompt([[3]]), Generation(max_new_tokens=50))
    assert isinstance(tokens, Iterator)
    assert toy.calls == 0
    next(tokens)
    next(tokens)
    assert toy.calls == 2


# --- sampling ------------------------------------------------------------------------------------


def drawn(how: dict[str, Any], count: int = 4000) -> Counter[int]:
    rows = [[3]] * count
    found = generate(Toy(count), toy_prompt(rows), Generation(max_new_tokens=1, **how))
    return Counter(found[:, 0].tolist())


def test_samples_follow_the_distribution() -> None:
    for temperature in (0.5, 1.0, 3.0):
        logits = toy_logits([3]).astype(np.float64) / temperature
        chances = np.exp(logits) / np.exp(logits).sum()
        found = drawn({"temperature": temperature, "seed": 1})
        for token, chance in enumerate(chances):
            assert found[token] / 4000 == pytest.approx(chance, abs=0.03)


def test_top_k_and_top_p_cut_the_tail() -> None:
    logits = toy_logits([3])
    order = np.argsort(-logits)
    assert set(drawn({"top_k": 2, "seed": 0})) == set(order[:2].tolist())
    chances = np.exp(logits) / np.exp(logits).sum()
    first = float(chances[order[0]])
    assert set(drawn({"top_p": first * 0.9, "seed": 0})) == {int(order[0])}
    assert set(drawn({"top_p": first * 1.01, "seed": 0})) == set(order[:2].tolist())
    assert len(drawn({"top_p": 1.0, "seed": 0})) == VOCABULARY
    assert set(drawn({"top_k": 1, "temperature": 9.0})) == {int(order[0])}


def test_rows_draw_alike_however_many_run_together() -> None:
    prompts, how = [[3], [4, 5], [3], [6]], Generation(max_new_tokens=8, temperature=2.0, seed=3)
    together = generate(Toy(4, eos=-99), toy_prompt(prompts), how)
    for row, ids in enumerate(prompts):
        prompt = replace(toy_prompt([ids]), first=row)
        assert generate(Toy(1, eos=-99), prompt, how).tolist() == [together[row].tolist()]
    assert together[0].tolist() != together[2].tolist(), "equal rows are drawn apart"


@pytest.mark.parametrize("temperature", [1e-310, 1e-40, 1e-6])
def test_in_the_cold_the_best_is_drawn(temperature: float) -> None:
    cold = Generation(max_new_tokens=6, temperature=temperature)
    best = generate(Toy(2, eos=-99), toy_prompt([[3], [4]]), replace(cold, temperature=None))
    drawn_ids = generate(Toy(2, eos=-99), toy_prompt([[3], [4]]), cold)
    np.testing.assert_array_equal(drawn_ids, best)


@pytest.mark.parametrize("size", [1, 7, 256, 5000])
def test_the_largest_are_those_of_a_sort(size: int) -> None:
    rng = np.random.default_rng(size)
    for values in (rng.standard_normal(size), rng.integers(0, 9, size), np.full(size, -np.inf)):
        for count in {1, min(5, size), size}:
            kth = np.sort(values)[::-1][count - 1]
            assert largest(values, count).tolist() == np.flatnonzero(values >= kth).tolist()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3000), st.floats(0.01, 0.999), st.floats(0.1, 9), st.integers(0, 99))
def test_the_nucleus_is_that_of_a_sort(size: int, share: float, spread: float, seed: int) -> None:
    powers = np.exp(spread * np.random.default_rng(seed).standard_normal(size))
    chances = powers / powers.sum()
    order = np.argsort(-chances, kind="stable")
    before = chances[order].cumsum() - chances[order]
    assert _nucleus(chances, share).tolist() == order[: (before < share).sum()].tolist()


@pytest.mark.parametrize("size", [9, 3000])
def test_the_best_next_tokens_are_those_of_a_sort(size: int) -> None:
    """Of three beams, the sums of all next tokens; two beams are equal."""
    rng = np.random.default_rng(size)
    logits = rng.standard_normal((3, size)).astype(np.float32)
    logits[2] = logits[1]
    totals = np.array([-1.0, -2.0, -2.0], np.float32)
    peak = logits.max(axis=1, keepdims=True)
    scores = logits - peak - np.log(np.exp(logits - peak).sum(axis=1, keepdims=True))
    scores[:, 4] = -np.inf
    flat = (scores + totals[:, None]).ravel()
    expected = [divmod(int(i), size) for i in np.argsort(-flat, kind="stable")[:6]]
    found = _best_next(logits, totals, np.array([4, size + 1]), 6)
    assert [(beam, token) for beam, token, _ in found] == expected
    np.testing.assert_allclose([total for *_, total in found], np.sort(flat)[::-1][:6], rtol=1e-6)


def test_a_seed_repeats_itself() -> None:
    def sample(seed: int) -> list[list[int]]:
        how = Generation(max_new_tokens=8, temperature=2.0, seed=seed)
        ids: list[list[int]] = generate(Toy(4, eos=-99), toy_prompt([[3]] * 4), how).tolist()
        return ids

    assert sample(1) == sample(1) != sample(2)


# --- what is refused -----------------------------------------------------------------------------


def test_no_repetition_penalty_is_a_penalty_of_one() -> None:
    assert Generation(repetition_penalty=None) == Generation()
    for penalty in (None, 1, 1.0):
        assert repetition_of(Prompt(rows=[[1]]), Generation(repetition_penalty=penalty)) is None


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens 0: expected at least 1"),
        ({"max_new_tokens": -3}, "max_new_tokens -3"),
        ({"min_new_tokens": 31}, "min_new_tokens 31: expected 0 to 30"),
        ({"num_beams": 0}, "num_beams 0"),
        ({"temperature": -0.1}, "temperature -0.1: expected a finite number of at least 0"),
        ({"temperature": 0, "do_sample": True}, "temperature 0: nothing is drawn then"),
        ({"do_sample": 1}, "do_sample 1: expected True, False or None"),
        ({"repetition_penalty": 0}, "repetition_penalty 0: expected a finite number above 0"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty inf"),
        ({"temperature": float("nan")}, "temperature nan"),
        ({"top_k": -1}, "top_k -1"),
        ({"top_p": 0.0}, "top_p 0.0"),
        ({"top_p": 1.5}, "top_p 1.5"),
        ({"num_beams": 2, "temperature": 1.0}, "beams are not drawn"),
        ({"max_new_tokens": 4.5}, "max_new_tokens 4.5: expected an integer, found float"),
        ({"max_new_tokens": "4"}, "max_new_tokens '4': expected an integer, found str"),
        ({"max_new_tokens": None}, "max_new_tokens None: expected an integer"),
        ({"min_new_tokens": True}, "min_new_tokens True: expected an integer"),
        ({"num_beams": 2.0}, "num_beams 2.0: expected an integer"),
        ({"num_beams": 1_000_000}, "num_beams 1000000: expected 1 to 128"),
        ({"length_penalty": float("nan")}, "length_penalty nan: expected -50 to 50"),
        ({"length_penalty": -1e4}, "length_penalty -10000.0"),
        ({"early_stopping": "never"}, "early_stopping never: expected True or False"),
        ({"temperature": "1"}, "temperature 1: expected a finite number"),
        ({"temperature": 10**400}, "temperature 1000.*: expected a finite number"),
        ({"repetition_penalty": 10**400}, "repetition_penalty 1000.*: expected a finite number"),
        ({"max_time": 10**400}, "max_time 1000.*: expected a finite number of seconds"),
        ({"top_k": 1.5}, "top_k 1.5: expected an integer"),
        ({"top_p": "half"}, "top_p half"),
        ({"seed": -1}, "seed -1: expected at least 0"),
        ({"stop_ids": 2}, "stop_ids 2: expected a tuple"),
        ({"stop_ids": (2, -1)}, "stop_ids -1: expected at least 0"),
        ({"pad_id": -1}, "pad_id -1: expected at least 0"),
    ],
)
def test_options_that_cannot_be(how: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Generation(**how)


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"temperature": 1.0}])
@pytest.mark.parametrize(
    ("token", "value", "found"),
    [
        (3, np.nan, "NaN"),
        (3, np.inf, "infinite logits"),
        (slice(None), -np.inf, "infinite logits"),
    ],
)
def test_logits_that_say_nothing_are_an_error(
    how: dict[str, Any], token: Any, value: float, found: str
) -> None:
    toy = Toy(2, eos=-99, broken=(3, token, value))
    with pytest.raises(InternVLError, match=rf"{found} after 3 positions, row"):
        generate(toy, toy_prompt([[3], [4]]), Generation(**how))


@pytest.mark.parametrize("how", [{}, {"num_beams": 2}, {"top_k": 2}])
def test_stop_ids_that_the_vocabulary_lacks_stop_nothing(how: dict[str, Any]) -> None:
    asked = Generation(max_new_tokens=4, min_new_tokens=2, stop_ids=(100_000,), **how)
    assert generate(Toy(1), toy_prompt([[3]]), asked).shape == (1, 4)


def test_beams_cannot_be_streamed() -> None:
    with pytest.raises(UsageError, match="only one beam can be streamed"):
        next(stream(Toy(1), toy_prompt([[3]]), Generation(num_beams=2)))

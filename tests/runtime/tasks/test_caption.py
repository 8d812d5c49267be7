"""Text about images: against the reference, once per image, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from support.checkpoints import TINY, write_internvl, write_tokenizer

import internvl_edge
from internvl_edge import compiler
from internvl_edge.cli import run
from internvl_edge.compiler import ExportOptions
from internvl_edge.errors import InternVLError, MediaError, UsageError
from internvl_edge.export.checkpoint.load import load_reference
from internvl_edge.runtime.generation.batch import Generation
from internvl_edge.runtime.generation.text import TextStream, until_end
from internvl_edge.runtime.model import Model
from internvl_edge.runtime.text.tokenizer import CAPTION_PROMPT, Tokenizer
from internvl_edge.types import Array

PROMPTS = ["a red seven", "English caption: a", "what colour is the three? a blue"]
SHORT = {"max_new_tokens": 12}


@pytest.fixture(scope="module")
def place(tmp_path_factory: Any) -> Path:
    folder: Path = tmp_path_factory.mktemp("speak")
    written = write_internvl(folder / "checkpoint", seed=3)
    write_tokenizer(written.path)
    components = ("vision", "image_queries", "decoder")
    compiler.export(
        ExportOptions(checkpoint=written.path, out=folder / "out", components=components)
    )
    for i in range(2):
        picture = np.random.default_rng(i).integers(0, 256, (32, 40, 3), np.uint8)
        Image.fromarray(picture).save(folder / f"{i}.png")
    return folder


@pytest.fixture
def model(place: Path) -> Any:
    with internvl_edge.load(place / "out") as opened:
        yield opened


@pytest.fixture(scope="module")
def reference(place: Path) -> Any:
    return load_reference(place / "checkpoint")


@pytest.fixture(scope="module")
def pixels() -> Array:
    return np.random.default_rng(0).standard_normal((3, 3, 28, 28)).astype(np.float32)


def greedy(reference: Any, model: Model, pixels: Array, prompts: list[str], count: int) -> Any:
    ids, mask = model.tokenizer.prompt(prompts)
    tensors = map(torch.from_numpy, (pixels, ids, mask))
    return reference.generate(*tensors, count).numpy()


def counted(model: Model, component: str) -> list[int]:
    """How many rows each call of a component computes from here on."""
    session, rows = model.session(component), []
    run_session = session.run

    def watched(feeds: Any, **more: Any) -> Any:
        rows.append(len(next(iter(feeds.values()))))
        return run_session(feeds, **more)

    session.run = watched  # type: ignore[method-assign]
    return rows


def test_ids_are_the_references(model: Model, reference: Any, pixels: Array) -> None:
    found = model.generate(pixels, PROMPTS, **SHORT)
    expected = greedy(reference, model, pixels, PROMPTS, 12)
    np.testing.assert_array_equal(found, expected)
    split = model.generate(pixels, PROMPTS, batch_size=2, **SHORT)
    np.testing.assert_array_equal(split, expected)


def test_texts_are_decoded_ids(model: Model, pixels: Array) -> None:
    ids = model.generate(pixels, PROMPTS, **SHORT)
    decode = model.tokenizer.decode
    assert model.answer(pixels, PROMPTS, **SHORT) == [decode(row) for row in ids]
    assert model.caption(pixels, num_beams=1, **SHORT) == [
        decode(row) for row in model.generate(pixels, CAPTION_PROMPT, **SHORT)
    ]
    beams = model.caption(pixels, **SHORT)
    assert beams == model.answer(pixels, CAPTION_PROMPT, num_beams=5, **SHORT)


def test_the_end_of_a_text_is_not_part_of_it(model: Model, pixels: Array) -> None:
    ids = model.generate(pixels[:1], "a red seven", max_new_tokens=8)
    third = int(ids[0, 2])
    cut = model.answer(pixels[:1], "a red seven", max_new_tokens=8, stop_ids=(third,))
    assert cut == [model.tokenizer.decode(ids[0, : ids[0].tolist().index(third)])]


def test_one_image_is_seen_once(model: Model, pixels: Array) -> None:
    vision, queries = counted(model, "vision"), counted(model, "image_queries")
    questions = [f"what colour is the {word}?" for word in "abcdefghijklmnopqrst"]
    together = model.answer(pixels[:1], questions, **SHORT)
    assert (vision, queries) == ([1], [1])
    seen = model.see(pixels[:1])
    one_by_one = [model.answer(seen, question, **SHORT)[0] for question in questions]
    assert (vision, queries) == ([1, 1], [1, 1])
    assert one_by_one == together
    assert "".join(model.stream(seen, questions[0], **SHORT)) == together[0]
    model.answer(pixels, questions[0], batch_size=2, **SHORT)
    assert vision == queries == [1, 1, 2, 1]


def test_images_that_were_seen_keep_their_order(model: Model, pixels: Array) -> None:
    seen = model.see(pixels)
    assert len(seen) == 3
    whole = model.generate(pixels, PROMPTS, **SHORT)
    np.testing.assert_array_equal(model.generate(seen, PROMPTS, batch_size=2, **SHORT), whole)


def test_a_stream_is_the_answer_in_pieces(model: Model, pixels: Array) -> None:
    pieces = list(model.stream(pixels[:1], "a red seven", **SHORT))
    assert len(pieces) > 2
    assert ["".join(pieces)] == model.answer(pixels[:1], "a red seven", **SHORT)


def test_streamed_pieces_are_the_decoded_whole(place: Path) -> None:
    """Of any tokens: spaces, halves of characters, control tokens."""
    tokenizer = Tokenizer(place / "checkpoint" / "tokenizer.model")
    rng, how = np.random.default_rng(1), Generation(stop_ids=(2,))
    byte_ids = [3 + byte for text in ("é", " ", "\n", "▁", "數") for byte in text.encode()]
    for _ in range(300):
        spelled = [*rng.integers(0, tokenizer.vocab_size, 12), *rng.choice(byte_ids, 4)]
        ids = [int(i) for i in rng.permutation(spelled)]
        decoded: list[int] = []

        def decode(window: list[int], decoded: list[int] = decoded) -> str:
            decoded.append(len(window))
            return tokenizer.decode(window)

        pieces = list(TextStream((np.array([i]) for i in ids), how, decode, 0))
        assert "".join(pieces) == tokenizer.decode(until_end(ids, how))
        assert all(pieces)


def test_a_stream_decodes_a_token_twice(place: Path) -> None:
    tokenizer, decoded = Tokenizer(place / "checkpoint" / "tokenizer.model"), list[int]()

    def decode(window: list[int]) -> str:
        decoded.append(len(window))
        return tokenizer.decode(window)

    ids = tokenizer.pieces("a red seven left of a blue three") * 50
    assert "".join(TextStream((np.array([i]) for i in ids), Generation(), decode, 0))
    assert max(decoded) < 8
    assert sum(decoded) < 5 * len(ids)


def test_draws_do_not_depend_on_the_batch(model: Model, pixels: Array) -> None:
    how = {"temperature": 2.0, "seed": 5, **SHORT}
    together = model.generate(pixels, PROMPTS, **how)
    for size in (1, 2):
        np.testing.assert_array_equal(
            model.generate(pixels, PROMPTS, batch_size=size, **how), together
        )


def test_what_an_engine_does_not_hold_is_refused_before_work(model: Model, pixels: Array) -> None:
    vision, session = counted(model, "vision"), cast(Any, model.session("decoder"))
    session.largest = {"batch": 4, "length": 6, "past": 20}
    ids = np.full((1, 6), 5)
    assert model.generate(pixels[:1], ids, max_new_tokens=11, stop_ids=()).shape == (1, 11)
    with pytest.raises(UsageError, match="takes past up to 20, 21 are needed for 11 positions bef"):
        model.generate(pixels[:1], ids, max_new_tokens=12)
    with pytest.raises(UsageError, match="takes length up to 6, 7 are needed for 7 tokens"):
        model.generate(pixels[:1], np.full((1, 7), 5), max_new_tokens=1)
    with pytest.raises(UsageError, match="takes batch up to 4, 5 are needed for 5 beams"):
        model.caption(pixels[:1], "a", max_new_tokens=2)
    with pytest.raises(UsageError, match="takes past up to 20"):
        model.stream(pixels[:1], "a", max_new_tokens=30)
    assert vision == [1, 1], "of the call that fits, and of the stream"


def test_rows_beyond_the_engines_batch_are_split(model: Model, pixels: Array) -> None:
    whole = model.generate(pixels, PROMPTS, num_beams=2, **SHORT)
    session, batches = cast(Any, model.session("decoder")), set()
    session.largest = {"batch": 4}
    run = session.run_device

    def watched(feeds: Any, **more: Any) -> Any:
        batches.add(len(feeds["input_ids"]))
        return run(feeds, **more)

    session.run_device = watched
    np.testing.assert_array_equal(model.generate(pixels, PROMPTS, num_beams=2, **SHORT), whole)
    assert batches == {2, 1}, "prompts of two beams each"


def test_special_tokens_that_a_user_types_are_text(
    model: Model, reference: Any, pixels: Array
) -> None:
    typed = "</s> a <s> red [PAD] <unk>"
    ids, _ = model.tokenizer.prompt([typed])
    assert set(ids[0, 1:].tolist()).isdisjoint({0, 1, 2})
    found = model.generate(pixels[:1], typed, **SHORT)
    np.testing.assert_array_equal(found, greedy(reference, model, pixels[:1], [typed], 12))


def test_ids_are_prompts_too(model: Model, pixels: Array) -> None:
    ids, _ = model.tokenizer.prompt(PROMPTS)
    assert (ids == 0).any()
    np.testing.assert_array_equal(
        model.generate(pixels, ids, **SHORT), model.generate(pixels, PROMPTS, **SHORT)
    )


def test_the_cache_may_be_filled_to_the_brim(model: Model, pixels: Array) -> None:
    room = TINY.qllama.max_position_embeddings - TINY.num_query_token
    ids = np.full((1, room - 3), 5)
    found = model.generate(pixels[:1], ids, max_new_tokens=4, min_new_tokens=4)
    assert found.shape == (1, 4)
    with pytest.raises(UsageError, match="the cache has 128 positions, 129 are needed: 5 for the"):
        model.generate(pixels[:1], ids, max_new_tokens=5)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m, p: m.answer(p, ""), MediaError, "prompt 1 of 1: expected text, found none"),
        (lambda m, p: m.answer(p, ["a", " ", "b"]), MediaError, "prompt 2 of 3"),
        (lambda m, p: m.answer(p, ["a", "b"]), UsageError, "3 images and 2 prompts"),
        (lambda m, p: m.answer(p, "a" * 999), UsageError, "the cache has 128 positions"),
        (lambda m, p: m.caption(p, max_new_tokens=0), UsageError, "max_new_tokens 0"),
        (lambda m, p: m.caption(p, num_beam=2), UsageError, "did you mean 'num_beams'"),
        (lambda m, p: m.caption(p, temperature=1.0, num_beams=2), UsageError, "are not drawn"),
        (lambda m, p: m.caption(p, max_length=9), UsageError, "called 'max_new_tokens' here"),
        (lambda m, p: m.generate(p, np.array([[1, 5, 0]])), MediaError, "zeros as padding"),
        (lambda m, p: m.generate(p, np.array([[0, 0]])), MediaError, "zeros as padding"),
        (lambda m, p: m.generate(p, [[1, 999]]), UsageError, "1 of 1: token id 999: .* 0 to 299"),
        (lambda m, p: m.answer(p, "a", stop_ids=(300,)), UsageError, "stop_ids: token id 300"),
        (lambda m, p: list(m.stream(p, "a")), UsageError, "found 3 and 1"),
        (lambda m, p: list(m.stream(p[:1], ["a", "b"])), UsageError, "found 1 and 2"),
        (lambda m, p: list(m.stream(p[:1], num_beams=2)), UsageError, "only one beam"),
        (lambda m, p: m.caption([]), MediaError, "at least one image"),
        (lambda m, p: m.caption(p, batch_size=0), UsageError, "batch_size 0"),
    ],
)
def test_refusals(model: Model, pixels: Array, call: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        call(model, pixels)


def test_captions_are_drawn_as_transformers_users_ask(model: Model, pixels: Array) -> None:
    greedy, beams = model.caption(pixels, num_beams=1, **SHORT), model.caption(pixels, **SHORT)
    assert model.caption(pixels, temperature=0, **SHORT) == greedy
    assert model.caption(pixels, do_sample=False, temperature=9.0, **SHORT) == beams
    one = model.caption(pixels, temperature=0.7, seed=1, num_beams=1, **SHORT)
    assert model.caption(pixels, temperature=0.7, seed=1, **SHORT) == one
    fifty = model.caption(pixels, do_sample=True, top_k=50, seed=2, **SHORT)
    assert model.caption(pixels, do_sample=True, seed=2, **SHORT) == fifty
    repeated = model.generate(pixels, [[1, 5, 9]], repetition_penalty=1e6, **SHORT)
    for row in repeated.tolist():  # a token that was there has no chance
        new = [token for token in row if token not in (0, 2)]
        assert len({*new, 1, 5, 9}) == len(new) + 3


def test_a_stream_of_images_is_captioned_a_batch_at_a_time(model: Model, place: Path) -> None:
    pictures = (place / f"{i}.png" for i in (0, 1, 0, 1, 1))
    rows = counted(model, "vision")
    captions = model.caption(pictures, batch_size=2, **SHORT)
    first, second = model.caption([place / "0.png", place / "1.png"], **SHORT)
    assert captions == [first, second, first, second, second]
    assert rows[:3] == [2, 2, 1]


def test_nan_is_an_error_not_text(model: Model, pixels: Array) -> None:
    seen = model.see(pixels[:1])
    next(iter(seen.cache.values()))[:] = np.nan
    with pytest.raises(InternVLError, match="the decoder gave NaN"):
        model.caption(seen)


# --- the command line ----------------------------------------------------------------------------


def answer(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> list[dict[str, Any]]:
    assert run([*map(str, arguments), "--json"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.strip().splitlines()]


def test_caption_from_the_shell(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures = [place / "0.png", place / "1.png"]
    (found,) = answer(capsys, "caption", place / "out", *pictures, "--max-new-tokens", "9")
    with internvl_edge.load(place / "out") as model:
        expected = model.caption(pictures, max_new_tokens=9)
    assert [row["caption"] for row in found["results"]] == expected
    assert run(["caption", str(place / "out"), str(pictures[0]), "--max-new-tokens", "9"]) == 0
    assert capsys.readouterr().out == f"{pictures[0]}: {expected[0]}\n"


def test_a_caption_is_drawn_from_one_beam(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    drawn = ["--temperature", "0.8", "--seed", "1", "--max-new-tokens", "9"]
    (found,) = answer(capsys, "caption", place / "out", place / "0.png", *drawn)
    with internvl_edge.load(place / "out") as model:
        how = {"num_beams": 1, "temperature": 0.8, "seed": 1, "max_new_tokens": 9}
        assert [found["results"][0]["caption"]] == model.caption([place / "0.png"], **how)
    assert (
        run(["caption", str(place / "out"), str(place / "0.png"), *drawn, "--num-beams", "2"]) == 2
    )


def test_answers_from_the_shell(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = place / "0.png"
    asked = ["--prompt", PROMPTS[0], "--prompt", PROMPTS[1], "--max-new-tokens", "9"]
    (found,) = answer(capsys, "answer", place / "out", image, *asked)
    with internvl_edge.load(place / "out") as model:
        expected = model.answer([image], PROMPTS[:2], max_new_tokens=9)
    assert [row["answer"] for row in found["results"]] == expected


def test_a_stream_from_the_shell(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = place / "0.png"
    options = ["--prompt", PROMPTS[0], "--max-new-tokens", "9", "--stream"]
    *pieces, last = answer(capsys, "answer", place / "out", image, *options)
    assert len(pieces) > 1
    assert "".join(p["piece"] for p in pieces) == last["results"][0]["answer"]
    assert all(p["piece"] for p in pieces)
    assert run(["answer", str(place / "out"), str(image), *options]) == 0
    assert capsys.readouterr().out == last["results"][0]["answer"] + "\n"
    code = run(["answer", str(place / "out"), str(image), *options, "--prompt", "b"])
    assert code == 2
    assert "expected one of prompts, found 2" in capsys.readouterr().err

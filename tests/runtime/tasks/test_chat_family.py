"""Conversations with a compiled model of the Qwen kind: byte-level ids, tiles, videos, thoughts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.chat.tokenizers import open_tokenizer, write_qwen
from support.checkpoints.family import write_family
from support.golden import FAMILY

from internvl_edge import compiler, load
from internvl_edge.cli import run
from internvl_edge.compiler import ExportOptions
from internvl_edge.errors import ContextLengthError, MediaError, UsageError
from internvl_edge.runtime.generation.answers import Answers
from internvl_edge.runtime.generation.batch import Generation
from internvl_edge.runtime.model import Model
from internvl_edge.runtime.tasks import chat_images
from internvl_edge.runtime.text.chat_tokenizer import ChatTokenizer
from internvl_edge.runtime.text.templates import THINKING

pytestmark = pytest.mark.slow
SPARE = 20  # rows of the embedding without a token
PER_TILE = 4
POSITIONS = 900


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("family")
    ids = open_tokenizer(write_qwen(folder / "tokenizer")).ids
    language = {
        "vocab_size": max(ids.values()) + 1 + SPARE,
        "max_position_embeddings": POSITIONS,
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": None,
    }
    path = write_family(folder / "checkpoint", "qwen3", language=language).path
    (path / "added_tokens.json").unlink()
    write_qwen(path)
    compiler.export(ExportOptions(checkpoint=path, out=folder / "out", verify="none"))
    return folder / "out"


@pytest.fixture(scope="module")
def model(out: Path) -> Iterator[Model]:
    with load(out) as opened:
        yield opened


def continued(model: Model, images: Any, ids: list[int], count: int) -> str:
    """Greedy text after ids, by ``generate``."""
    stop = model.components.chat_tokenizer.ids["<|im_end|>"]
    new = model.generate(images, [ids], max_new_tokens=count, stop_ids=(stop,))[0].tolist()
    return model.components.chat_tokenizer.decode(new[: new.index(stop)] if stop in new else new)


def test_what_a_directory_has_of_a_tokenizer(out: Path) -> None:
    names = {path.name for path in out.iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json"} <= names
    assert not {"tokenizer.model", "vocab.json", "merges.txt"} & names
    assert "print(model.chat(" in (out / "README.md").read_text(encoding="utf-8")


# --- prompts -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"system": "be brief"}, {"template": "Hermes-2"}, {"max_tiles": 2}]
)
def test_the_prompt_is_what_the_model_reads(model: Model, options: dict[str, Any]) -> None:
    image, history = picture(150, 60), [("<image>\nwhat is it", "a cat")]
    text, ids = model.chat_prompt(image, "why", history, **options)
    said = model.chat(image, "why", history, max_new_tokens=6, **options)
    seen = model.see(image, max_tiles=options.get("max_tiles"))
    assert said.text == continued(model, seen, ids, 6)
    assert text.count("<IMG_CONTEXT>") == seen.places[0]  # type: ignore[union-attr]
    assert "a cat<|im_end|>" in text


def test_prompts_of_a_model_without_any(tmp_path: Path) -> None:
    compiler.export(ExportOptions(out=tmp_path / "out", components=("vision",), verify="none"))
    with load(tmp_path / "out") as demo:
        for options in ({}, {"template": "Hermes-2"}):  # which a model without text cannot have
            with pytest.raises(UsageError, match="expected an InternVL-Ch"):
                demo.chat_prompt(None, "why", **options)


def test_padding_is_no_letter(model: Model) -> None:
    """Id 0 is "!": a prompt may begin with it, and rows are padded with <|endoftext|>."""
    padding = model.components.chat_tokenizer.pad_id
    assert padding not in (0, None)
    rows = [[0, 0, 5, 6, 7], [padding, padding, 8, 9, 10]]
    both = model.generate(None, rows, max_new_tokens=4, stop_ids=())
    assert (
        both[0].tolist()
        == model.generate(None, [rows[0]], max_new_tokens=4, stop_ids=())[0].tolist()
    )
    assert (
        both[1].tolist()
        == model.generate(None, [rows[1][2:]], max_new_tokens=4, stop_ids=())[0].tolist()
    )
    assert (
        both[0].tolist()
        != model.generate(None, [rows[0][2:]], max_new_tokens=4, stop_ids=())[0].tolist()
    )
    with pytest.raises(MediaError, match=f"expected ids after {padding} as padding"):
        model.generate(None, [[padding, padding]])


def test_a_row_that_ended_is_filled_with_padding(model: Model) -> None:
    ids = [[5, 6], [7, 8]]
    whole = model.generate(None, ids, max_new_tokens=4, stop_ids=())
    stop = int(whole[0, 0])
    ended = model.generate(None, ids, max_new_tokens=4, stop_ids=(stop,))
    assert set(ended[0, 1:].tolist()) <= {model.components.chat_tokenizer.pad_id}


# --- images --------------------------------------------------------------------------------------


def test_how_many_tiles(model: Model) -> None:
    wide = picture(300, 60)
    for most, tiles in ((1, 1), (2, 3), (12, 6)):
        _, ids = model.chat_prompt(wide, "why", max_tiles=most)
        place = model.components.chat_tokenizer.ids["<IMG_CONTEXT>"]
        assert ids.count(place) == PER_TILE * tiles
    for wrong in (0, 41, -1, True, 2.0):
        with pytest.raises(UsageError, match="expected 1 to 40 tiles of an image"):
            model.chat(wide, "why", max_tiles=wrong)  # type: ignore[arg-type]


def test_images_that_share_a_place(model: Model) -> None:
    a, b = picture(150, 60), picture(60, 60, seed=1)
    text, _ = model.chat_prompt([[a, b]], "why")
    apart, _ = model.chat_prompt([a, b], "why")
    assert text.count("<img>") == 1
    assert apart.count("<img>") == 2
    assert text.count("<IMG_CONTEXT>") == apart.count("<IMG_CONTEXT>")
    with pytest.raises(MediaError, match="expected images in a list that shares a place"):
        model.chat([[a], []], "why")


def test_tiles_that_are_normalised_already(model: Model) -> None:
    wide = picture(150, 60)
    (tiles,) = chat_images.cut(model.components, [wide]).tiles
    pixels = np.concatenate([*model.components.pixel_batches(tiles, "retrieval", 8)])
    given = model.see([pixels])
    np.testing.assert_array_equal(given.tokens[0], model.see(wide).tokens[0])  # type: ignore[union-attr]


def test_as_many_tiles_at_a_time_as_memory_has_room_for(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = picture(300, 60)
    whole = model.see(wide)
    sizes: list[int] = []
    batches = model.components.pixel_batches

    def counted(images: Any, transform: Any, batch_size: int) -> Any:
        sizes.append(batch_size)
        return batches(images, transform, batch_size)

    monkeypatch.setattr(model.components, "pixel_batches", counted)
    monkeypatch.setattr(chat_images, "available_memory", lambda: 1 << 10)
    model.components.answers.images.clear()
    few = model.see(wide)
    assert sizes == [1]
    np.testing.assert_allclose(
        few.tokens[0],  # type: ignore[union-attr]
        whole.tokens[0],  # type: ignore[union-attr]
        atol=1e-5,
    )


def test_a_videos_frames(model: Model, tmp_path: Path) -> None:
    for i in range(10):
        picture(60, 60, seed=i).save(tmp_path / f"{i}.png")
    frames = model.chat_frames(tmp_path, 3)
    assert [Path(frame).name for frame in frames] == ["1.png", "4.png", "7.png"]
    typed = "Frame1: <image>\nFrame2: <image>\nFrame3: <image>\nwhat"
    text, ids = model.chat_prompt(frames, "<video>\nwhat", max_tiles=1)
    assert (text, ids) == model.chat_prompt(frames, typed, max_tiles=1)
    said = model.chat(frames, "<video>\nwhat", max_tiles=1, max_new_tokens=2)
    assert said.history[0].question == typed


@pytest.mark.parametrize("count", [0, -1, 2.5, "8", None, True, 1025, 10**9, 10**400])
def test_frames_that_cannot_be_so_many(model: Model, tmp_path: Path, count: Any) -> None:
    picture(60, 60).save(tmp_path / "0.png")
    with pytest.raises(UsageError, match=r"^num_frames .*: expected "):
        model.chat_frames(tmp_path, count)
    assert len(model.chat_frames(tmp_path, 1024)) == 1024


# --- answers -------------------------------------------------------------------------------------


def test_a_thought_is_no_part_of_the_conversation(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Generation] = []

    def noted(self: Answers, session: Any, opening: Any, how: Generation) -> list[int]:
        asked.append(how)
        return [0]

    monkeypatch.setattr(Answers, "ids", noted)
    monkeypatch.setattr(ChatTokenizer, "decode", lambda self, ids: "<think>\nhm\n</think>\n\nyes")
    reply = model.chat(None, "why", think=True)
    assert (reply.thought, reply.text) == ("hm", "yes")
    assert reply.history[-1].answer == "yes"
    assert (asked[0].temperature, asked[0].top_p) == (0.6, 0.95)
    model.chat(None, "why", think=True, temperature=None)
    assert not asked[1].is_sampled
    text, _ = model.chat_prompt(None, "more", reply.history, think=True)
    assert f"system\n{THINKING}<|im_end|>" in text
    assert "hm" not in text.replace(THINKING, "")
    kept = replace(reply.history[-1], thought=reply.thought)
    text, _ = model.chat_prompt(None, "more", [kept], think=True)
    assert "<think>\nhm\n</think>\n\nyes<|im_end|>" in text


def test_as_many_new_tokens_as_fit(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def noted(self: Answers, session: Any, opening: Any, how: Generation) -> list[int]:
        asked.append(how.max_new_tokens)
        return [0]

    monkeypatch.setattr(Answers, "ids", noted)
    model.chat(None, "why")
    _, ids = model.chat_prompt(None, "why")
    assert asked == [POSITIONS - len(ids) + 1]


def test_too_long_a_text_is_refused_before_the_tower_runs(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise AssertionError("the vision tower ran")

    monkeypatch.setattr(chat_images, "_image_tokens", fail)
    with pytest.raises(ContextLengthError, match=f"the cache has {POSITIONS} positions"):
        model.chat(picture(60, 60), "word " * POSITIONS)


# --- the shell -----------------------------------------------------------------------------------


def asked_in_the_shell(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert run(["chat", *arguments, "--max-new-tokens", "3", "--json"]) == 0
    told: dict[str, Any] = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    return told


def test_the_shell_talks_about_images_and_videos(
    out: Path, model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [tmp_path / f"{i}.png" for i in range(3)]
    for i, path in enumerate(files):
        picture(60, 60, seed=i).save(path)
    images = [str(path) for path in files[:2]]
    told = asked_in_the_shell(capsys, str(out), *images, "--combined", "--question", "why")
    expected = model.chat([files[:2]], "why", max_new_tokens=3)
    (turn,) = told["turns"]
    assert (turn["question"], turn["answer"]) == ("why", expected.text)
    assert turn["usage"] == {**asdict(expected.usage), "reused_tokens": 0}
    video = ["--video", str(tmp_path), "--frames", "2"]
    told = asked_in_the_shell(capsys, str(out), *video, "--question", "why")
    frames = model.chat_frames(tmp_path, 2)
    expected = model.chat(frames, "<video>\nwhy", max_tiles=1, max_new_tokens=3).text
    assert told["turns"][0]["answer"] == expected
    told = asked_in_the_shell(
        capsys, str(out), images[0], "--think", "--seed", "1", "--top-k", "1", "--question", "why"
    )
    assert (
        told["turns"][0]["answer"]
        == model.chat(files[0], "why", think=True, top_k=1, max_new_tokens=3).text
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-tiles", "41"], "--max-tiles 41: expected 1 to 40 tiles"),
        (["--think", "--system", "S"], "expected one of the two"),
        (["--template", "nope"], "template 'nope': expected one of"),
        (["--video", "x"], "--video x: expected neither IMAGES"),
    ],
)
def test_the_shell_refuses(
    out: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    picture(60, 60).save(tmp_path / "a.png")
    command = ["chat", str(out), str(tmp_path / "a.png"), "--question", "why", *arguments]
    assert run(command) == UsageError.exit_code
    told = capsys.readouterr().err.strip().splitlines()
    assert len(told) == 1
    assert message in told[0]


# --- golden --------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["chat", "hf"])
@pytest.mark.parametrize("kind", FAMILY)
def test_the_whole_way_equals_the_original(
    family: Path, kind: str, layout: str, tmp_path: Path
) -> None:
    """From a checkpoint and a picture to ids: prompt, tiles, greedy, batch, beams, ends."""
    path, expected = family / kind, np.load(family / kind / "reference.npz")
    told = json.loads((path / "prompt_cases.json").read_text(encoding="utf-8"))
    case = told["cases"]["one_image"]
    out = tmp_path / "out"
    compiler.export(ExportOptions(checkpoint=path / layout, out=out))
    with load(out) as model:
        wide = path / "wide.png"
        template = None if model.artifact.manifest.model["chat"]["template"] else "phi3-chat"
        prefix = "hf_" if layout == "hf" and "hf_ids" in case else ""
        _, ids = model.chat_prompt(wide, case["turns"][0][0], template=template)
        if prefix or layout == "chat":
            assert ids == case[f"{prefix}ids"]
        (tiles,) = chat_images.cut(model.components, [wide]).tiles
        pixels = np.concatenate([*model.components.pixel_batches(tiles, "retrieval", 8)])
        np.testing.assert_array_equal(pixels, expected["pixel_values"])
        seen = model.see([wide])
        prompt = expected["input_ids"]
        greedy = model.generate(seen, prompt, max_new_tokens=24, stop_ids=())
        np.testing.assert_array_equal(greedy, expected["greedy_ids"])
        two = [expected["batch.pixel_values"][:3], expected["batch.pixel_values"][3:]]
        rows = model.generate(two, expected["batch.input_ids"], max_new_tokens=24, stop_ids=())
        np.testing.assert_array_equal(rows, expected["batch.greedy_ids"])
        end = int(expected["ended.eos"])
        for name, stop, how in (
            ("beam3_ids", case["eos"], {"num_beams": 3}),
            ("ended.greedy_ids", end, {}),
            ("ended.beam3_ids", end, {"num_beams": 3}),
            ("ended.beam3.penalty0_ids", end, {"num_beams": 3, "length_penalty": 0.0}),
            ("ended.beam3.early_ids", end, {"num_beams": 3, "early_stopping": True}),
        ):
            new = model.generate(seen, prompt, max_new_tokens=24, stop_ids=(stop,), **how)
            np.testing.assert_array_equal(new, expected[name], err_msg=name)
        if kind == "phi3":
            new = model.generate(None, expected["long.input_ids"], max_new_tokens=8, stop_ids=())
            np.testing.assert_array_equal(new, expected["long.greedy_ids"])

"""Prompts of conversations: places, sentences, thoughts, and the golden ones."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from support.chat.tokenizers import WRITERS, open_tokenizer

from internvl_edge.errors import MediaError, UsageError
from internvl_edge.runtime.components import OpenComponents
from internvl_edge.runtime.tasks.chat_prompt import (
    ChatOptions,
    ChatPrompt,
    make_prompt,
    placed,
)
from internvl_edge.runtime.text.chat_tokenizer import PLACE, ChatTokenizer
from internvl_edge.runtime.text.templates import NATIVE, THINKING, Turn

KINDS = ("llama", "llama3", "internlm2", "qwen2", "qwen3")


def of(tokenizer: ChatTokenizer, **chat: Any) -> OpenComponents:
    """Components as far as prompts need them."""
    model = {"chat": {"template": "internvl2_5", "system": None, **chat}}
    manifest = SimpleNamespace(model=model)
    artifact = SimpleNamespace(path=Path("OUT"), manifest=manifest)
    return cast(OpenComponents, SimpleNamespace(artifact=artifact, chat_tokenizer=tokenizer))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    return open_tokenizer(WRITERS["qwen"](tmp_path_factory.mktemp("qwen")))


def prompt(
    tokenizer: ChatTokenizer,
    question: str = "why",
    places: tuple[int, ...] = (),
    history: Any = (),
    chat: dict[str, Any] | None = None,
    **options: Any,
) -> ChatPrompt:
    components = of(tokenizer, **(chat or {}))
    return make_prompt(components, places, question, history, ChatOptions(**options))


# --- sentences -----------------------------------------------------------------------------------


def test_whose_system_sentence_it_is(tokenizer: ChatTokenizer) -> None:
    own = {"system": "the checkpoint's"}
    assert "书生·万象" in prompt(tokenizer).text
    assert "system\nthe checkpoint's<" in prompt(tokenizer, chat=own).text
    assert "system\nmine<" in prompt(tokenizer, chat=own, system="mine").text
    assert f"system\n{THINKING}<" in prompt(tokenizer, chat=own, think=True).text
    assert prompt(tokenizer, system="").text.startswith("<|im_start|>system\n<|im_end|>\n<|im")


def test_the_native_template_has_no_sentence_of_its_own(tokenizer: ChatTokenizer) -> None:
    plain = "<|im_start|>user\nwhy<|im_end|>\n<|im_start|>assistant\n"
    assert prompt(tokenizer, chat={"template": NATIVE}).text == plain
    assert prompt(tokenizer, template=NATIVE, system="").text == plain
    said = prompt(tokenizer, template=NATIVE, system="S").text
    assert said == f"<|im_start|>system\nS<|im_end|>\n{plain}"


def test_two_system_sentences_are_refused(tokenizer: ChatTokenizer) -> None:
    with pytest.raises(UsageError, match="system and think: expected one of the two"):
        prompt(tokenizer, system="S", think=True)
    with pytest.raises(UsageError, match="think must be True or False, found 'no'"):
        ChatOptions(think="no")  # type: ignore[arg-type]


def test_a_checkpoint_whose_template_is_unknown(tokenizer: ChatTokenizer) -> None:
    with pytest.raises(UsageError, match=r"OUT: expected a template: .*\(internvl-hf is that of"):
        prompt(tokenizer, chat={"template": ""})
    assert prompt(tokenizer, chat={"template": ""}, template="Hermes-2").text


def test_sentences_that_are_no_text(tokenizer: ChatTokenizer) -> None:
    with pytest.raises(MediaError, match="system: expected no NUL"):
        prompt(tokenizer, system="\0")
    with pytest.raises(MediaError, match="question: expected text, found none"):
        prompt(tokenizer, "<image><video> ")


# --- places --------------------------------------------------------------------------------------


def questions(count: int, *asked: str) -> list[str]:
    return [turn.question for turn in placed([Turn(question=text) for text in asked], count)]


def test_places_of_images() -> None:
    assert questions(2, "why") == ["<image>\n<image>\nwhy"]
    assert questions(2, "a <image>", "b <image>") == ["a <image>", "b <image>"]
    assert questions(0, "why") == ["why"]
    for count, asked in ((0, "<image>"), (1, "<image><image>"), (3, "<image><image>")):
        with pytest.raises(UsageError, match=rf"expected one for each of {count} image"):
            questions(count, asked)


def test_places_of_a_videos_frames() -> None:
    frames = "Frame1: <image>\nFrame2: <image>"
    assert questions(2, "<video>\nwhy") == [f"{frames}\nwhy"]
    assert questions(3, "like <image>: <video>?") == [f"like <image>: {frames}?"]
    typed = "Frame-1: <image>\nFrame-2: <image>\nwhy"
    assert questions(2, typed) == [typed]
    assert questions(1, "<image> <video>") == ["<image> <video>"]
    assert questions(0, "what is <video> in HTML?") == ["what is <video> in HTML?"]
    with pytest.raises(UsageError, match="has 2 <video>, expected one at most"):
        questions(4, "<video>", "<video>")


def test_ids_have_the_checkpoints_id_of_a_place(tokenizer: ChatTokenizer) -> None:
    asked = prompt(tokenizer, places=(3,))
    assert asked.ids.count(PLACE) == asked.text.count("<IMG_CONTEXT>") == 3
    assert asked.ids_with(7777).count(7777) == 3
    assert asked.ids_with(None) == asked.ids
    assert asked.stop_id == tokenizer.ids["<|im_end|>"]


# --- history -------------------------------------------------------------------------------------


def test_a_thought_is_spelled_where_a_turn_has_it(tokenizer: ChatTokenizer) -> None:
    without = Turn(question="a", answer="yes")
    thoughtful = Turn(question="a", answer="yes", thought="hm")
    written = ("a", "<think>\nhm\n</think>\n\nyes")
    assert "hm" not in prompt(tokenizer, history=[without]).text
    kept = prompt(tokenizer, history=[thoughtful])
    assert kept.text == prompt(tokenizer, history=[written]).text
    assert kept.ids == prompt(tokenizer, history=[written]).ids
    assert kept.ids.count(tokenizer.ids["<think>"]) == 1


def test_what_is_empty_has_no_end(tokenizer: ChatTokenizer) -> None:
    open_end = "<|im_start|>user\n<|im_start|>assistant\n<|im_start|>user\nwhy<|im_end|>\n"
    assert open_end in prompt(tokenizer, history=[("", "")]).text


def test_histories_of_something_else(tokenizer: ChatTokenizer) -> None:
    for wrong in (["a"], [("a", None, "b")], [Turn(question="a", answer="b", thought="\0")]):
        with pytest.raises(UsageError, match="history, turn 1 of 1: expected a Turn"):
            prompt(tokenizer, history=wrong)


# --- golden --------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["chat", "hf"])
@pytest.mark.parametrize("kind", KINDS)
def test_prompts_equal_the_originals(family: Path, kind: str, layout: str) -> None:
    told = json.loads((family / kind / "prompt_cases.json").read_text(encoding="utf-8"))
    own = open_tokenizer(family / kind / layout, fast_first=layout == "hf")
    template = NATIVE if layout == "hf" else told["template"]
    prefix = "hf_" if layout == "hf" else ""
    asked = {name: case for name, case in told["cases"].items() if f"{prefix}ids" in case}
    assert len(asked) > 10
    for name, case in asked.items():
        *history, (question, _) = case["turns"]
        places = tuple(tiles * told["tokens_per_tile"] for tiles in case["tiles"])
        got = prompt(own, question, places, history, {"template": template}, system=case["system"])
        assert got.text == case[f"{prefix}prompt"], name
        assert got.ids_with(own.ids["<IMG_CONTEXT>"]) == case[f"{prefix}ids"], name
        assert got.stop_id == case["eos"], name
    thinking = told["cases"]["thinking"]
    assert thinking["system"] == THINKING

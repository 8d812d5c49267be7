"""Answers timed from the question to the last token, of several callers."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import write_chat, write_internvl, write_tokenizer

from internvl_edge import compiler
from internvl_edge.artifact.components import DECODER
from internvl_edge.artifact.open import open_artifact
from internvl_edge.benchmark import chat
from internvl_edge.benchmark.chat import COLUMNS, ChatLoad, run_chats
from internvl_edge.cli import run
from internvl_edge.compiler import ExportOptions
from internvl_edge.errors import UsageError
from internvl_edge.runtime.generation.limits import num_positions

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def outs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("benchmark")
    write_chat(folder / "chat", seed=3)
    written = write_internvl(folder / "single", seed=3).path
    write_tokenizer(written)
    for name, more in (
        ("chat", {"cache_capacity": 300}),
        ("single", {"components": ("vision", "image_queries", "decoder")}),
    ):
        options: dict[str, Any] = {"checkpoint": folder / name, "out": folder / f"{name}-out"}
        compiler.export(ExportOptions(**options, verify="none", **more))
    return folder


LOAD = ChatLoad(prompt_tokens=5, answer_tokens=6, callers=(1, 2), seconds=0.01)


def measured(out: Path, load: ChatLoad = LOAD) -> Any:
    return run_chats({"it": open_artifact(out)}, load, "auto", "cpu", None)


def test_each_number_of_callers_has_its_figures(outs: Path) -> None:
    one, two = measured(outs / "chat-out").results
    assert (one.callers, one.slots, two.callers, two.slots) == (1, 0, 2, 2)
    assert two.answers >= 4  # two turns of two callers
    for each in (one, two):
        assert each.inter_token.count == 5 * each.answers
        firsts = (each.first_token, each.next_first_token)
        parts = sum(stage.avg * stage.count for stage in each.stages.values())
        assert parts == pytest.approx(sum(one.avg * one.count for one in firsts))
        assert each.stages["vision"].count == each.first_token.count == each.answers / 2
        assert each.stages["vision"].min > 0
        assert 0.3 < each.reused < 0.6  # of two turns, nearly all of the second but its question
        assert each.tokens_per_second > 0


def test_an_internvl_g_is_asked_single_questions(outs: Path) -> None:
    (one,) = measured(outs / "single-out", ChatLoad(prompt_tokens=3, callers=(1,))).results
    assert (one.slots, one.reused) == (0, 0)
    assert one.stages["vision"].max > 0


def test_a_question_that_has_no_room_is_refused(outs: Path) -> None:
    """The last one of a conversation counts, before the first is answered."""
    room = num_positions(open_artifact(outs / "single-out").manifest, DECODER)
    with pytest.raises(UsageError, match=rf"it, --prompt {room}: .* new tokens; lower --prompt"):
        measured(outs / "single-out", ChatLoad(prompt_tokens=room, callers=(1,), seconds=0.0))
    load = ChatLoad(prompt_tokens=300 // 2 - 5, answer_tokens=6, tiles=0, callers=(1,), seconds=0.0)
    with pytest.raises(UsageError, match="has 300 positions, 301 are needed"):
        measured(outs / "chat-out", load)
    (one,) = measured(outs / "chat-out", replace(load, answer_tokens=5)).results
    assert one.answers == 2


def test_the_command_writes_json_and_markdown(
    outs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--prompt", "4", "--answer", "3", "--callers", "2", "--seconds", "0", "--tiles", "0"]
    file = tmp_path / "table.md"
    command = ["benchmark", str(outs / "chat-out"), "--task", "chat", *options]
    report = tmp_path / "report.html"
    assert run([*command, "--markdown", str(file), "--report", str(report), "--json"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    (figures,) = told["results"]
    assert (told["task"], figures["callers"], told["load"]["tiles"]) == ("chat", 2, 0)
    assert figures["inter_token_latency"]["unit"] == "ms"
    head, _, row, *_ = file.read_text().splitlines()
    assert head.count("|") == row.count("|") == len(COLUMNS) + 1
    drawn = report.read_text()
    for waits in ("first token", "first token of the next turn", "prefill", "next token"):
        assert f"chat-out, callers 2: {waits}: min " in drawn
    assert "answers of 3 tokens" in drawn


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--task", "chat", "--batch", "2"], "--batch is no option of --task chat"),
        (["--task", "chat", "--p99", "2"], "--p99 is no option of --task chat"),
        (["--callers", "2"], "--callers is no option of --task components"),
        (["--task", "chat", "--callers", "0"], "--callers: expected positive numbers"),
        (["--task", "chat", "--callers", "1,20000"], "--callers 20000: expected at most 1024"),
        (["--scenario", "offline", "--streams", "20000"], "20000 is not in the range 1<=x<=1024"),
        (
            ["--task", "chat", "--prompt", "400", "--answer", "9", "--tiles", "0"],
            "--prompt 400: the cache has 300 positions, 817 are needed: 809 for the conversation "
            "with its images and 9 new tokens; lower --prompt or --answer, or take fewer --tiles",
        ),
        (
            ["--task", "chat", "--prompt", "120", "--answer", "30"],
            "--prompt 120: the cache has 300 positions, ",
        ),
        (["--task", "chat", "--tiles", "2"], "this model reads one square"),
    ],
    ids=["batch", "p99", "callers", "none", "crowd", "streams", "long", "long next turn", "tiles"],
)
def test_what_cannot_be_asked(
    outs: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["benchmark", str(outs / "chat-out"), *options]) != 0
    assert message in " ".join(capsys.readouterr().err.split())


def test_an_error_ends_all_callers(outs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many that would go on for an hour."""
    converse, begun = chat._Chat.converse, time.monotonic()

    def failing(self: Any, samples: Any, seed: int) -> None:
        if seed == 9:  # the third conversation of the last of three callers
            raise UsageError("this one fails")
        converse(self, samples, seed)

    monkeypatch.setattr(chat._Chat, "converse", failing)
    load = ChatLoad(prompt_tokens=3, answer_tokens=3, callers=(3,), seconds=3600.0)
    with pytest.raises(UsageError, match="this one fails"):
        measured(outs / "chat-out", load)
    assert time.monotonic() - begun < 60


def test_a_directory_without_a_decoder_is_refused(tmp_path: Path) -> None:
    written = write_internvl(tmp_path / "checkpoint", seed=3).path
    options = ExportOptions(
        checkpoint=written, out=tmp_path / "out", components=("vision",), verify="none"
    )
    compiler.export(options)
    with pytest.raises(UsageError, match="it: --task chat asks a decoder, and it has none"):
        measured(tmp_path / "out")


@pytest.mark.parametrize("field", ["prompt_tokens", "callers", "slots", "tiles"])
def test_numbers_that_cannot_be(field: str) -> None:
    values: dict[str, Any] = {"callers": (0,), "tiles": -1}
    with pytest.raises(UsageError, match="expected at least"):
        ChatLoad(**{field: values.get(field, 0)})

"""Logits of the last positions: the same numbers, and a decoder's contract as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from support.chat.generation import COMPONENTS, noise
from support.checkpoints import write_internvl, write_tokenizer

import internvl_edge
from internvl_edge import compiler, open_session
from internvl_edge.artifact.open import open_artifact
from internvl_edge.benchmark.inputs import seeded_feeds
from internvl_edge.compiler import ExportOptions
from internvl_edge.errors import FeedError
from internvl_edge.runtime.feeds import LOGITS_FROM
from internvl_edge.runtime.generation.batch import Generation, Prompt
from internvl_edge.runtime.generation.cache import start as begin
from internvl_edge.runtime.generation.loop import generate
from internvl_edge.runtime.ort.session import OrtSession
from internvl_edge.types import Array


@pytest.fixture(scope="module", params=[None, 40], ids=["growing", "in_place"])
def out(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("last_logits")
    path = write_internvl(folder / "checkpoint", seed=9).path
    write_tokenizer(path)
    options = ExportOptions(
        checkpoint=path, out=folder / "out", components=COMPONENTS, cache_capacity=request.param
    )
    compiler.export(options)
    return folder / "out"


def feeds_of(out: Path) -> dict[str, Array]:
    return seeded_feeds(open_artifact(out), "decoder", 2)


@pytest.mark.slow
def test_they_are_the_last_of_all(out: Path) -> None:
    feeds = feeds_of(out)
    with open_session(out, "decoder") as session:
        every = session.run(feeds)
        for start in (-1, -2, 1, -10_000):
            some = session.run({**feeds, LOGITS_FROM: np.array([start])})
            expected = every["logits"][:, start:]
            assert some["logits"].shape == expected.shape
            np.testing.assert_allclose(some["logits"], expected, rtol=0, atol=1e-5)
            np.testing.assert_array_equal(some["present.0.key"], every["present.0.key"])
    assert every["logits"].shape[1] == feeds["position_ids"].shape[1]


def test_the_contract_does_not_name_the_input(out: Path) -> None:
    record = open_artifact(out).manifest.components["decoder"]
    with open_session(out, "decoder") as session:
        assert [spec.name for spec in record.inputs] == list(session.inputs)
        assert LOGITS_FROM not in session.inputs
    onnx.checker.check_model(out / "decoder.onnx", full_check=True)


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (np.array([999]), "'logits_from': expected a position below .* last, found 999"),
        (np.array([1], np.int32), "'logits_from': expected int64"),
        (np.array([1, 1]), "'logits_from': expected int64"),
        (np.array(1), "'logits_from': expected 1 dimensions"),
    ],
    ids=["after", "dtype", "two", "scalar"],
)
def test_positions_that_cannot_be(out: Path, start: Array, message: str) -> None:
    with open_session(out, "decoder") as session, pytest.raises(FeedError, match=message):
        session.run({**feeds_of(out), LOGITS_FROM: start})


def test_other_components_do_not_take_it(out: Path) -> None:
    feeds = {"pixel_values": noise(), LOGITS_FROM: np.array([1])}
    with (
        open_session(out, "vision") as session,
        pytest.raises(FeedError, match="unknown logits_from"),
    ):
        session.run(feeds)


def test_a_prompt_has_logits_of_its_last_position(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes, native = [], onnxruntime.InferenceSession
    bound, handed = native.run_with_iobinding, native.run_with_ortvaluevector

    def watched(self: Any, binding: Any, *args: Any) -> None:
        bound(self, binding, *args)
        shapes.extend(v.shape()[:2] for v in binding.get_outputs() if len(v.shape()) == 3)

    def watched_too(self: Any, *args: Any) -> None:
        handed(self, *args)
        shapes.append(args[4][0].shape()[:2])  # of what it gave, the logits first

    monkeypatch.setattr(native, "run_with_iobinding", watched)
    monkeypatch.setattr(native, "run_with_ortvaluevector", watched_too)
    with internvl_edge.load(out) as model:
        model.generate(noise(1, 2), np.array([[1, 7, 9, 5]]), max_new_tokens=3, stop_ids=())
    assert shapes == [[2, 1]] * 3


def without_the_input(path: Path) -> None:
    """Make a graph as it was before."""
    model = onnx.load(path, load_external_data=False)
    taken = next(node for node in model.graph.node if node.name == "logits_from/Slice")
    for node in model.graph.node:
        for i, name in enumerate(node.input):
            if name == taken.output[0]:
                node.input[i] = taken.input[0]
    for node in [n for n in model.graph.node if n.name.startswith("logits_from/")]:
        model.graph.node.remove(node)
    for values in (model.graph.input, model.graph.initializer):
        for value in [v for v in values if v.name.startswith(LOGITS_FROM)]:
            values.remove(value)
    path.write_bytes(model.SerializeToString())


def test_directories_without_it_give_the_same_ids(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    for file in out.iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    without_the_input(tmp_path / "decoder.onnx")
    with internvl_edge.load(out) as model:
        cache = model.see(noise(1, 2)).cache
    past = next(iter(cache.values())).shape[2]
    prompt, how = Prompt(rows=[[1, 7, 9], [1, 4]], past=past), Generation(max_new_tokens=12)
    found = []
    for folder in (out, tmp_path):
        with OrtSession(folder / "decoder.onnx") as session:
            found.append(generate(begin(session, cache), prompt, how))
            assert (LOGITS_FROM in session.optional) == (folder is out)
    np.testing.assert_array_equal(*found)

"""Decoding on the graph for CUDA: rows without padding, and steps in buffers that are lent.

The CPU provider computes the same graph; that a step is captured there only a GPU can show.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from support.checkpoints import write_internvl, write_tokenizer

from internvl_edge import compiler
from internvl_edge.artifact.open import open_artifact
from internvl_edge.compiler import ExportOptions
from internvl_edge.runtime.generation.batch import Generation, Prompt
from internvl_edge.runtime.generation.cache import start
from internvl_edge.runtime.generation.loop import generate
from internvl_edge.runtime.ort import choice
from internvl_edge.runtime.ort import session as sessions
from internvl_edge.runtime.ort.options import CPU, OrtOptions
from internvl_edge.runtime.ort.session import OrtSession
from internvl_edge.runtime.ort.steps import Lent, Steps
from internvl_edge.runtime.ort.values import copied, value_of
from internvl_edge.types import Array

HERE = ("cpu", 0)
PAST, CAPACITY, TOKENS = 5, 40, 8
ROWS = [[1, 9, 4, 7], [1, 5], [1, 8, 6]]
EXACT = OrtOptions(exact=True)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("steps")
    write_internvl(root / "checkpoint", seed=5)
    write_tokenizer(root / "checkpoint")
    compiler.export(
        ExportOptions(
            checkpoint=root / "checkpoint",
            out=root / "out",
            components=("decoder",),
            precision="int4-wo",
            cache_capacity=CAPACITY,
            verify="none",
        )
    )
    return root / "out"


@pytest.fixture(scope="module")
def published(out: Path) -> Iterator[OrtSession]:
    with OrtSession(out / "decoder.onnx", options=EXACT) as session:
        yield session


@pytest.fixture
def fused(out: Path) -> Iterator[OrtSession]:
    """A session as it is on a GPU, but for where it computes."""
    with OrtSession(out / "decoder.cuda.onnx", options=EXACT, pads=False) as session:
        session._steps = Steps(session._session, HERE)
        yield session


def cache_of(session: OrtSession, rows: int) -> dict[str, Array]:
    rng = np.random.default_rng(2)
    return {
        name: rng.standard_normal(
            (1, int(spec.shape[1]), PAST, int(spec.shape[3])), np.float32
        ).repeat(rows, axis=0)
        for name, spec in session.outputs.items()
        if name.startswith("present.")
    }


def answered(session: OrtSession, rows: list[list[int]], **how: Any) -> Array:
    prompt = Prompt(rows=rows, past=PAST)
    options = Generation(max_new_tokens=TOKENS, stop_ids=(), **how)
    return generate(start(session, cache_of(session, len(rows))), prompt, options)


@pytest.mark.parametrize(
    "rows", [ROWS[:1], [ROWS[0], ROWS[0][::-1]], ROWS], ids=["one", "as long", "padded"]
)
def test_ids_are_those_of_the_published_graph(
    rows: list[list[int]], published: OrtSession, fused: OrtSession
) -> None:
    np.testing.assert_array_equal(answered(fused, rows), answered(published, rows))


def test_beams_are_those_of_the_published_graph(published: OrtSession, fused: OrtSession) -> None:
    for row in ROWS:
        found, expected = (answered(s, [row], num_beams=3) for s in (fused, published))
        np.testing.assert_array_equal(found, expected)


def test_every_row_has_places_of_its_own(fused: OrtSession) -> None:
    """What is read together is what is read alone."""
    alone = np.concatenate([answered(fused, [row]) for row in ROWS])
    np.testing.assert_array_equal(answered(fused, ROWS), alone)


@pytest.mark.slow
def test_buffers_are_lent_to_one_generation_at_a_time(fused: OrtSession) -> None:
    steps: Any = fused._steps
    answered(fused, ROWS[:1])
    gc.collect()
    assert steps._num_steps == 1
    assert len(steps._idle[1]) == 1
    first, second = (start(fused, cache_of(fused, 1)) for _ in range(2))
    ids, token = np.array([[1, 9]]), np.array([[4]])
    expected = None
    for decoding in (first, second):
        decoding.run(ids, np.ones((1, PAST + 2), np.int64), PAST + np.array([[0, 1]]))
    for decoding in (first, second):
        logits = decoding.run(token, np.ones((1, PAST + 3), np.int64), np.array([[PAST + 2]]))
        expected = logits if expected is None else expected
        np.testing.assert_array_equal(logits, expected)
    assert isinstance(first._cache, Lent)  # type: ignore[union-attr]
    assert steps._num_steps == 2
    assert steps._idle[1] == []
    del first, second, decoding
    gc.collect()
    assert len(steps._idle[1]) == 2


def test_beyond_the_limit_steps_are_not_captured(fused: OrtSession) -> None:
    expected = answered(fused, ROWS)
    fused._steps = Steps(fused._session, HERE, limit=0)
    np.testing.assert_array_equal(answered(fused, ROWS), expected)


def test_several_tokens_go_on_in_the_lent_buffers(fused: OrtSession) -> None:
    """As drafts do, which are verified in one call."""
    ones = lambda used: np.ones((1, PAST + used), np.int64)  # noqa: E731
    tokens, found = np.array([[1, 9, 4, 7, 3, 2]]), list[Array]()
    for cuts in ([2, 3, 5, 6], [2, 3, 4, 5, 6]):
        decoding, begun = start(fused, cache_of(fused, 1)), 0
        for end in cuts:
            places = np.arange(PAST + begun, PAST + end)[None]
            logits = decoding.run(tokens[:, begun:end], ones(end), places)
            begun = end
        found.append(logits)
    np.testing.assert_allclose(found[0], found[1], rtol=1e-2, atol=1e-2)


def test_a_cache_in_bfloat16_comes_to_the_host(fused: OrtSession) -> None:
    values = np.arange(6).reshape(2, 3).astype(ml_dtypes.bfloat16)
    (found,) = fused.fetch([copied(value_of(values, HERE), HERE)])
    assert found.dtype == values.dtype
    np.testing.assert_array_equal(found, values)


def test_each_provider_opens_its_own_graph(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = list[tuple[str, bool, bool]]()

    def note(path: Path, *, options: OrtOptions, pads: bool, **_: Any) -> None:
        opened.append((path.name, options.graphs, pads))

    def providers(device: str, options: OrtOptions = EXACT) -> list[Any]:
        return [CPU] if device == "cpu" else [("CUDAExecutionProvider", {}), CPU]

    monkeypatch.setattr(sessions, "OrtSession", note)
    monkeypatch.setattr(choice, "choose_providers", providers)
    artifact = open_artifact(out)
    for device, options in (
        ("cpu", OrtOptions()),
        ("cpu", OrtOptions(fold=False)),
        ("cuda", OrtOptions()),
        ("cuda", OrtOptions(contrib=False)),
    ):
        sessions.open_component(artifact, "decoder", device, options=options)
    assert opened == [
        ("decoder.cpu.onnx", False, True),
        ("decoder.onnx", False, True),  # weights are joined where constants are folded
        ("decoder.cuda.onnx", True, False),
        ("decoder.onnx", False, True),
    ]

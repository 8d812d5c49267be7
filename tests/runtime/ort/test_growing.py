"""A cache that grows, handed from call to call."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import helper
from support.tiny_onnx import FLOAT, write_onnx

from internvl_edge.errors import UsageError
from internvl_edge.runtime.ort.growing import Grown
from internvl_edge.runtime.ort.session import OrtSession
from internvl_edge.types import Array

KEY, VALUE = "past_key_values.0.key", "past_key_values.0.value"


@pytest.fixture
def session(tmp_path: Path) -> Iterator[Any]:
    """Logits 3 x, and a cache that x is appended to: to keys as it is, to values negated."""
    shapes = {"x": ["batch", "length"]} | {n: ["batch", "past"] for n in (KEY, VALUE)}
    outputs = [("logits", FLOAT, ["batch", "length"])]
    outputs += [(f"present.0.{one}", FLOAT, ["batch", "all"]) for one in ("key", "value")]
    nodes = [
        helper.make_node("Mul", ["x", "three"], ["logits"]),
        helper.make_node("Neg", ["x"], ["minus"]),
        helper.make_node("Concat", [KEY, "x"], ["present.0.key"], axis=1),
        helper.make_node("Concat", [VALUE, "minus"], ["present.0.value"], axis=1),
    ]
    path = write_onnx(
        tmp_path / "g.onnx",
        nodes,
        [(name, FLOAT, shape) for name, shape in shapes.items()],
        outputs,
        {"three": np.full(1, 3, np.float32)},
    )
    with OrtSession(path) as opened:
        yield opened


def first(session: OrtSession, rows: int = 1) -> list[Any]:
    """Begin: a cache of one position, 1 and -1."""
    x, none = np.ones((rows, 1), np.float32), np.zeros((rows, 0), np.float32)
    return list(session.run_device({"x": x, KEY: none, VALUE: none}).values())[1:]


def step(session: OrtSession, x: Array, cache: Any) -> tuple[Array, Any]:
    return session.step({"x": x}, [KEY, VALUE], cache)


def test_every_call_takes_what_the_one_before_gave(session: OrtSession) -> None:
    cache: Any = first(session)
    for number in range(2, 6):
        logits, cache = step(session, np.full((1, 1), number, np.float32), cache)
        assert logits.tolist() == [[3 * number]]
        assert isinstance(cache, Grown)
    keys, values = session.fetch(cache)
    assert keys.tolist() == [[1, 2, 3, 4, 5]]
    assert values.tolist() == [[-1, -2, -3, -4, -5]]


def test_a_cache_may_be_continued_twice(session: OrtSession) -> None:
    """Nothing that was given is written to by a later call."""
    _, cache = step(session, np.full((1, 1), 2, np.float32), first(session))
    logits, one = step(session, np.full((1, 1), 3, np.float32), cache)
    _, other = step(session, np.full((1, 1), 4, np.float32), cache)
    assert logits.tolist() == [[9]]
    assert [session.fetch(its)[0].tolist() for its in (cache, one, other)] == [
        [[1, 2]],
        [[1, 2, 3]],
        [[1, 2, 4]],
    ]


def test_it_is_a_sequence_and_its_rows_may_change_places(session: OrtSession) -> None:
    _, cache = step(session, np.array([[2], [3]], np.float32), first(session, 2))
    assert len(cache) == 2
    assert cache[-1].numpy().tolist() == [[-1, -2], [-1, -3]]
    with pytest.raises(IndexError):
        cache[2]
    taken = session.take_rows(cache, np.array([1, 0, 1]))
    _, grown = step(session, np.array([[4], [5], [6]], np.float32), taken)
    assert session.fetch(grown)[0].tolist() == [[1, 3, 4], [1, 2, 5], [1, 3, 6]]


def test_a_strided_array_is_read_as_it_stands(session: OrtSession) -> None:
    wide = np.arange(8, dtype=np.float32).reshape(2, 4)
    logits, cache = step(session, wide[:, ::2], first(session, 2))
    assert logits.tolist() == [[0, 6], [12, 18]]
    assert session.fetch(cache)[0].tolist() == [[1, 0, 2], [1, 4, 6]]


def test_logits_outlast_what_gave_them(session: OrtSession) -> None:
    logits, cache = step(session, np.full((1, 1), 2, np.float32), first(session))
    for _ in range(20):
        _, cache = step(session, np.full((1, 1), 7, np.float32), cache)
    del cache
    assert logits.tolist() == [[6]]


def test_closed_is_closed(session: OrtSession) -> None:
    cache = first(session)
    session.close()
    with pytest.raises(UsageError, match="closed"):
        step(session, np.ones((1, 1), np.float32), cache)

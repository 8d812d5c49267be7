"""Decoders for ONNX Runtime's CPU provider, compared with the published graphs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from support.checkpoints import write_internvl, write_tokenizer
from support.checkpoints.family import write_family

from internvl_edge import compiler
from internvl_edge.artifact.open import open_artifact
from internvl_edge.errors import VerificationError
from internvl_edge.export.graph.providers.cpu import FEW, take_cpu_form
from internvl_edge.runtime.feeds import MASK, POSITIONS, ROWS_UP_TO, numpy_dtype
from internvl_edge.runtime.generation.fixed_cache import PAST, in_place
from internvl_edge.runtime.ort.choice import choose_graph
from internvl_edge.runtime.ort.options import OrtOptions
from internvl_edge.runtime.ort.session import OrtSession
from internvl_edge.runtime.ort.values import value_of
from internvl_edge.types import Array

PAST_LENGTH, LENGTH, ROWS, CAPACITY = 5, 3, 2, 24


def export(root: Path, kind: str, precision: str, **more: Any) -> Path:
    """Export a decoder, and return its published graph."""
    if kind == "qllama":
        write_internvl(root / kind, seed=3)
        write_tokenizer(root / kind)
    else:
        write_family(root / kind, kind)
    component = "decoder" if kind == "qllama" else "chat_decoder"
    options = {"components": (component,), "verify": "none"} | more
    compiler.export(
        compiler.ExportOptions(
            checkpoint=root / kind, out=root / "out", precision=precision, **options
        )
    )
    return root / "out" / f"{component}.onnx"


def joined(path: Path) -> Path:
    return path.with_name(f"{path.stem}.cpu.onnx")


def run(path: Path, *, exact: bool, length: int = LENGTH) -> Mapping[str, Array]:
    """Read some tokens of two rows, one of them padded, after positions that are there."""
    rng = np.random.default_rng(0)
    with OrtSession(path, options=OrtOptions(exact=exact)) as session:
        feeds: dict[str, Array] = {}
        for name, spec in session.inputs.items():
            if name.startswith(PAST):
                shape = ROWS, spec.shape[1], PAST_LENGTH, spec.shape[3]
                feeds[name] = rng.standard_normal(shape).astype(numpy_dtype(spec.dtype))
            elif name == "inputs_embeds":
                shape = ROWS, length, spec.shape[2]
                feeds[name] = rng.standard_normal(shape).astype(np.float32)
        if "input_ids" in session.inputs:
            feeds["input_ids"] = rng.integers(3, 100, (ROWS, length))
        feeds[MASK] = np.ones((ROWS, PAST_LENGTH + length), np.int64)
        feeds[MASK][1, :2] = 0
        places = np.arange(PAST_LENGTH, PAST_LENGTH + length)
        feeds[POSITIONS] = np.stack([places, places - 2])
        return session.run(in_place(feeds, session.inputs))


def nodes(model: ir.Model, op_type: str) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type == op_type]


def takes_cache(model: ir.Model) -> set[bool]:
    """Tell whether attention has the cache among its inputs."""
    return {len(node.inputs) == 6 for node in nodes(model, "Attention")}


CASES = [
    pytest.param("qwen2", "int4-wo", {}, id="biases"),
    pytest.param("qwen3", "int4-wo", {}, id="norms-of-heads", marks=pytest.mark.slow),
    pytest.param("qllama", "int8-wo", {}, id="int8", marks=pytest.mark.slow),
    pytest.param("llama", "int4-wo", {"head": "int8"}, id="head", marks=pytest.mark.slow),
    pytest.param("qwen2", "int4-wo", {"cache_capacity": CAPACITY}, id="in-place"),
]


@pytest.mark.parametrize("kind, precision, more", CASES)
def test_every_output_is_the_published_one_bit_by_bit(
    kind: str, precision: str, more: dict[str, Any], tmp_path: Path
) -> None:
    """But for one token's, where heads share keys: it is added up in another order."""
    path = export(tmp_path, kind, precision, **more)
    before, after = (ir.load(one) for one in (path, joined(path)))
    layers = len(nodes(before, "Attention"))
    assert len(nodes(after, "MatMul")) == len(nodes(before, "MatMul")) - 2 * layers > 0
    assert takes_cache(after) == {"cache_capacity" not in more}
    shares_keys = kind != "qllama"
    assert len(nodes(after, "Tile")) == shares_keys
    for length, exact in product((1, LENGTH, FEW, FEW + 1), (True, False)):
        ours, published = (run(one, exact=exact, length=length) for one in (joined(path), path))
        assert ours.keys() == published.keys()
        for name, values in published.items():
            if length > 1 or not shares_keys:
                np.testing.assert_array_equal(ours[name], values, err_msg=name)
            elif exact:
                np.testing.assert_allclose(ours[name], values, atol=1e-5, err_msg=name)


def test_heads_that_share_keys_are_rows_of_few_tokens_alone(tmp_path: Path) -> None:
    path = export(tmp_path, "qwen2", "int4-wo")
    model = ir.load(joined(path))
    model.graph.outputs.extend(node.outputs[0] for node in nodes(model, "Where"))
    ir.save(model, joined(path))
    for length, (heads, times) in {1: (2, 2), FEW: (2, 2), FEW + 1: (4, 1)}.items():
        *_, one, other = run(joined(path), exact=True, length=length).values()
        shape, repeats = sorted((one.tolist(), other.tolist()))
        assert shape[:3] == [0, heads, -1]
        assert repeats == [1, 1, times, 1]


def test_a_processor_runs_it_and_its_weights_are_the_published_ones(tmp_path: Path) -> None:
    path = export(tmp_path, "qwen2", "int4-wo")
    artifact = open_artifact(path.parent)
    chosen = choose_graph(artifact, "chat_decoder", "cpu", OrtOptions())
    assert chosen.path.name == joined(path).name
    assert artifact.weights[joined(path).name] == artifact.weights[path.name]


@pytest.mark.parametrize("more", [{}, {"cache_capacity": CAPACITY}], ids=["growing", "in-place"])
def test_with_more_threads_than_heads_of_keys_heads_stay_heads(
    more: dict[str, Any], tmp_path: Path
) -> None:
    """Bit by bit the published graph's then, of one token too, whichever way it is called."""
    path = export(tmp_path, "qwen2", "int4-wo", **more)
    artifact = open_artifact(path.parent)
    kv_heads = 2
    few = choose_graph(artifact, "chat_decoder", "cpu", OrtOptions(num_threads=kv_heads))
    assert few.constants == {}
    options = OrtOptions(num_threads=kv_heads + 1)
    many = choose_graph(artifact, "chat_decoder", "cpu", options)
    assert {name: array.tolist() for name, array in many.constants.items()} == {ROWS_UP_TO: [0]}
    results = []
    for graph, constants in ((path, {}), (many.path, many.constants), (few.path, {})):
        with OrtSession(graph, constants=constants, options=OrtOptions(exact=True)) as session:
            assert ROWS_UP_TO not in session.optional
            results.append([*logits_of_one_token(session)])
    published, ours, grouped = results
    for expected, found in zip(published, ours, strict=True):
        np.testing.assert_array_equal(found, expected)
    assert any((a != b).any() for a, b in zip(published, grouped, strict=True))


@pytest.mark.parametrize("kind", ["qllama", "earlier"])
def test_a_graph_that_does_not_ask_up_to_how_many_tokens_is_given_nothing(
    kind: str, tmp_path: Path
) -> None:
    """Where no heads share keys, and where an earlier version wrote it."""
    path = export(tmp_path, "qllama" if kind == "qllama" else "qwen2", "int4-wo")
    if kind == "earlier":
        model = ir.load(joined(path))
        model.graph.inputs.remove(next(v for v in model.graph.inputs if v.name == ROWS_UP_TO))
        ir.save(model, joined(path))
    constants = {ROWS_UP_TO: np.zeros(1, np.int64)}
    with OrtSession(joined(path)) as plain, OrtSession(joined(path), constants=constants) as given:
        length = {"batch": 1, "length": 1, "past": 1, "past+length": 2}
        arrays = {
            name: np.ones([length.get(str(n), n) for n in spec.shape], numpy_dtype(spec.dtype))
            for name, spec in plain.inputs.items()
        }
        for one in (plain, given):
            one.run(arrays)
            cache = [value_of(arrays[n], ("cpu", 0)) for n in arrays if n.startswith(PAST)]
            names = [n for n in arrays if n.startswith(PAST)]
            one.step({n: a for n, a in arrays.items() if n not in names}, names, cache)


def logits_of_one_token(session: OrtSession) -> Iterator[Array]:
    """Read one token after others by every way there is."""
    rng = np.random.default_rng(1)
    feeds: dict[str, Array] = {
        "inputs_embeds": rng.standard_normal((1, 1, session.inputs["inputs_embeds"].shape[2])),
        MASK: np.ones((1, PAST_LENGTH + 1), np.int64),
        POSITIONS: np.array([[PAST_LENGTH]]),
    }
    feeds["inputs_embeds"] = feeds["inputs_embeds"].astype(np.float32)
    past = {
        name: rng.standard_normal((1, spec.shape[1], PAST_LENGTH, spec.shape[3]), np.float32)
        for name, spec in session.inputs.items()
        if name.startswith(PAST)
    }
    given = in_place(feeds | past, session.inputs)
    new = {name: array for name, array in given.items() if name not in past}
    kept = {name: given[name].copy() for name in past}
    yield session.run(dict(given))["logits"]
    yield session.run_device({**given, **{n: v.copy() for n, v in kept.items()}})["logits"].numpy()
    values = [value_of(kept[name].copy(), ("cpu", 0)) for name in past]
    yield session.step(new, [*past], values)[0].copy()
    if session.has_rows:
        rows = session.rows(1)
        for name, array in kept.items():
            rows.values[name][:] = array
        yield rows.run(slice(0, 1), new).copy()


@pytest.mark.parametrize("precision", ["fp32", "int8", "fp8"])
def test_other_precisions_have_none(precision: str, tmp_path: Path) -> None:
    path = export(tmp_path, "qwen2", precision)
    assert not joined(path).exists()


def test_what_is_not_as_expected_stays(tmp_path: Path) -> None:
    path = export(tmp_path, "qwen2", "int4-wo")
    model = ir.load(path)
    for node in nodes(model, "Transpose"):
        node.attributes["perm"] = ir.AttrInt64s("perm", [0, 1, 2, 3])
    assert take_cpu_form(model)
    assert takes_cache(model) == {False}
    model = ir.load(path)
    for node in nodes(model, "DequantizeLinear"):
        if ".k_proj." in str(node.name):
            node.attributes["block_size"] = ir.AttrInt64("block_size", 16)
    count = len(model.graph)
    assert not take_cpu_form(model)
    assert len(model.graph) == count


@pytest.mark.parametrize("whole", [True, False])
def test_a_mistake_is_seen_by_verification(
    whole: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def swapped(model: ir.Model) -> bool:
        is_done = take_cpu_form(model)
        for node in model.graph:
            if node.op_type == "Concat" and len(node.inputs) == 3:
                key, value = node.inputs[1:]
                node.replace_input_with(1, value)
                node.replace_input_with(2, key)
        return is_done

    if not whole:
        monkeypatch.setattr("internvl_edge.compiler.steps.verify.MAX_WHOLE_NBYTES", 0)
    for place in ("steps.provider_graphs", "oracle.run_graph"):
        monkeypatch.setattr(f"internvl_edge.compiler.{place}.take_cpu_form", swapped)
    with pytest.raises(VerificationError, match=r"chat_decoder\.cpu\.onnx"):
        export(tmp_path, "qwen2", "int4-wo", verify="full")


def test_without_a_mistake_verification_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("internvl_edge.compiler.steps.verify.MAX_WHOLE_NBYTES", 0)
    assert joined(export(tmp_path, "qwen2", "int4-wo", verify="full")).exists()

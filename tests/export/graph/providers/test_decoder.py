"""Decoders in ONNX Runtime's operators, compared with the published graphs on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from support.checkpoints import write_internvl, write_tokenizer
from support.checkpoints.family import write_family

from internvl_edge import compiler
from internvl_edge.artifact.open import open_artifact
from internvl_edge.compiler import ExportOptions
from internvl_edge.compiler.oracle.run_graph import take_norms_apart
from internvl_edge.errors import VerificationError
from internvl_edge.export.graph.providers import decoder as module
from internvl_edge.export.graph.providers.decoder import cuda_decoder
from internvl_edge.runtime.feeds import MASK, POSITIONS, WRITE_INDICES, numpy_dtype
from internvl_edge.runtime.generation.fixed_cache import PAST, PRESENT
from internvl_edge.runtime.ort.options import OrtOptions
from internvl_edge.runtime.ort.session import OrtSession
from internvl_edge.types import Array

pytestmark = pytest.mark.slow

FLOAT, FLOAT16 = ir.DataType.FLOAT, ir.DataType.FLOAT16
HEAD = ", int8 head"
CAPACITY, FIRST, PROMPT, TOKENS = 40, 5, 7, 4
# How their layers differ: heads of queries alone; grouped; biases; norms of heads; a tied head.
KINDS: dict[str, dict[str, Any]] = {
    "qllama": {},
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 32},
}


def export(root: Path, kind: str, precision: str, **more: Any) -> Path:
    checkpoint, out = root / kind, root / f"{kind}-{precision}"
    if not checkpoint.exists() and kind == "qllama":
        write_internvl(checkpoint, seed=3)
        write_tokenizer(checkpoint)
    elif not checkpoint.exists():
        write_family(checkpoint, kind, language=KINDS[kind])
    component = "decoder" if kind == "qllama" else "chat_decoder"
    options = {"components": (component,), "cache_capacity": CAPACITY, "verify": "none"} | more
    if precision.endswith(HEAD):
        precision, options["head"] = precision.removesuffix(HEAD), "int8"
    compiler.export(ExportOptions(checkpoint=checkpoint, out=out, precision=precision, **options))
    return out / f"{component}.onnx"


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    root, done = tmp_path_factory.mktemp("decoders"), dict[tuple[str, str], Path]()

    def path(kind: str, precision: str) -> Path:
        if (kind, precision) not in done:
            done[kind, precision] = export(root, kind, precision)
        return done[kind, precision]

    return path


def generated(path: Path, graph: ir.Model | None, rows: int = 1) -> list[dict[str, Array]]:
    """Run a prompt, after some positions that are there, and some tokens: outputs of each call."""
    rng, found = np.random.default_rng(0), list[dict[str, Array]]()
    if graph is not None:
        take_norms_apart(graph)
    data = None if graph is None else ir.to_proto(graph).SerializeToString()
    with OrtSession(path, graph=data, options=OrtOptions(exact=True)) as session:
        specs = session.inputs
        cache = {n: np.zeros((1, *s.shape[1:])) for n, s in specs.items() if n.startswith(PAST)}
        for values in cache.values():
            values[:, :, :FIRST] = rng.standard_normal(values[:, :, :FIRST].shape)
        first = FIRST
        for count, length in enumerate([PROMPT] + [1] * TOKENS):
            if count == 1:
                cache = {name: np.repeat(values, rows, axis=0) for name, values in cache.items()}
            places = np.arange(first, first + length)[None]
            batch = rows if count else 1
            feeds = {n: v.astype(numpy_dtype(specs[n].dtype)) for n, v in cache.items()}
            feeds[POSITIONS] = np.repeat(places, batch, axis=0)
            feeds[WRITE_INDICES] = np.full(batch, first)
            feeds[MASK] = np.ones((batch, CAPACITY), np.int64)
            if "input_ids" in specs:
                feeds["input_ids"] = rng.integers(0, 128, (batch, length))
            else:
                width = int(specs["inputs_embeds"].shape[2])
                drawn = rng.standard_normal((batch, length, width), np.float32)
                feeds["inputs_embeds"] = drawn
            outputs = session.run(feeds)
            first += length
            cache = {n: outputs[n.replace(PAST, PRESENT, 1)] for n in cache}
            found.append({n: v if n == "logits" else v[:, :, :first] for n, v in outputs.items()})
    return found


def largest_difference(ours: list[dict[str, Array]], theirs: list[dict[str, Array]]) -> float:
    return max(
        float(np.abs(a[name].astype(np.float32) - b[name]).max() / np.abs(b[name]).max())
        for a, b in zip(ours, theirs, strict=True)
        for name in b
    )


def require_same_ids(ours: list[dict[str, Array]], theirs: list[dict[str, Array]]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a["logits"].argmax(-1), b["logits"].argmax(-1))


CASES = [
    pytest.param("qllama", "int4-wo", id="qllama-int4"),
    pytest.param("qwen3", "fp32", id="qwen3", marks=pytest.mark.slow),
    pytest.param("llama", "fp32", id="llama", marks=pytest.mark.slow),
    pytest.param("qwen2", "fp32", id="qwen2", marks=pytest.mark.slow),
    pytest.param("qllama", "fp32", id="qllama", marks=pytest.mark.slow),
    pytest.param("qllama", "int8-wo", id="qllama-int8", marks=pytest.mark.slow),
    pytest.param("qwen2", "int4-wo", id="qwen2-int4", marks=pytest.mark.slow),
    pytest.param("llama", f"int4-wo{HEAD}", id="llama-int8-head", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("kind", "precision"), CASES)
def test_logits_and_caches_are_those_of_the_published_graph(
    kind: str, precision: str, published: Any
) -> None:
    path = published(kind, precision)
    expected = generated(path, None)
    exact = cuda_decoder(ir.load(path), FLOAT, divisor=16.0)
    assert exact is not None
    assert largest_difference(generated(path, exact), expected) < 2e-5
    narrow = cuda_decoder(ir.load(path), FLOAT16)
    assert narrow is not None
    found = generated(path, narrow)
    assert largest_difference(found, expected) < 1e-2
    require_same_ids(found, expected)


def test_rows_that_go_on_together_are_those_of_the_published_graph(published: Any) -> None:
    """Beams of one prompt: it is read as one row."""
    path = published("qllama", "int4-wo")
    fused = cuda_decoder(ir.load(path), FLOAT)
    found, expected = generated(path, fused, rows=3), generated(path, None, rows=3)
    assert found[-1]["logits"].shape[0] == 3
    assert largest_difference(found, expected) < 2e-5


def test_a_layer_is_eleven_kernels(published: Any) -> None:
    """Counted here by nodes that are left at run time; attention is several."""
    fused = cuda_decoder(ir.load(published("qllama", "int4-wo")), FLOAT16)
    assert fused is not None
    folded = set(fused.graph.initializers.values())
    counts = dict[str, int]()
    for node in fused.graph:
        if node.op_type == "DequantizeLinear" or all(value in folded for value in node.inputs):
            folded |= set(node.outputs)
        elif str(node.name).startswith("layers.1."):
            counts[node.op_type] = counts.get(node.op_type, 0) + 1
    assert counts == {
        "MatMul": 5,
        "GroupQueryAttention": 1,
        "SkipSimplifiedLayerNormalization": 2,
        "GatedRMSNorm": 1,
    }


@pytest.mark.parametrize("size", [1.0, 100.0, 3e4], ids=["small", "large", "huge"])
@pytest.mark.parametrize("apart", [False, True])
def test_a_gated_norm_of_a_large_epsilon_normalises_nothing(size: float, apart: bool) -> None:
    """x · silu(g) / 16 but for float16's roundings, up to values that float16 ends at."""
    epsilon, width = (module.NORM_SCALES[FLOAT16] * 16) ** 2, module.MAX_GROUP
    scale = np.full(width, module.NORM_SCALES[FLOAT16], np.float16)
    shape = ir.Shape((1, 3, 2 * width))
    x, gate = (
        ir.Value(name=name, type=ir.TensorType(FLOAT16), shape=shape) for name in ("x", "gate")
    )
    scales = ir.Value(
        name="scales",
        type=ir.TensorType(FLOAT16),
        shape=ir.Shape((width,)),
        const_value=ir.tensor(scale, name="scales"),
    )
    node = ir.node(
        *("GatedRMSNorm", [x, scales, gate], {"epsilon": epsilon}),
        domain=module.CONTRIB,
        name="gated",
    )
    node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape = "y", x.type, shape
    graph = ir.Graph(
        *([x, gate], node.outputs),
        nodes=[node],
        initializers=[scales],
        opset_imports={"": 23, module.CONTRIB: 1},
        name="gated",
    )
    model = ir.Model(graph, ir_version=10)
    if apart:
        take_norms_apart(model)
        assert not any(node.op_type == "GatedRMSNorm" for node in model.graph)
    rng = np.random.default_rng(1)
    given = [rng.standard_normal((1, 3, 2 * width)).astype(np.float16) for _ in range(2)]
    given[0] *= np.float16(size / 4)
    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    (found,) = session.run(None, dict(zip(("x", "gate"), given, strict=True)))
    up, g = (values.astype(np.float64) for values in given)
    expected = up * g / (1 + np.exp(-g)) / 16
    error = np.abs(found - expected)
    assert (error <= 1e-3 * np.abs(expected) + 2.0**-25).all()


def test_the_weights_are_the_published_files(published: Any) -> None:
    path = published("qllama", "int4-wo")
    external = [
        {
            v.name: v.const_value.offset
            for v in model.graph.initializers.values()
            if isinstance(v.const_value, ir.ExternalTensor)
        }
        for model in (ir.load(path), ir.load(path.with_name("decoder.cuda.onnx")))
    ]
    assert external[0] == external[1] != {}
    assert not list(path.parent.glob("*.data"))


# --- what is not known has no such graph ---------------------------------------------------------


def node_of(model: ir.Model, op_type: str, at: int = 0) -> ir.Node:
    return [node for node in model.graph if node.op_type == op_type][at]


def with_attribute(op_type: str, name: str, value: Any) -> Callable[[ir.Model], None]:
    def change(model: ir.Model) -> None:
        node_of(model, op_type).attributes[name] = ir.convenience.convert_attribute(name, value)

    return change


def with_node_before(op_type: str, new: str) -> Callable[[ir.Model], None]:
    def change(model: ir.Model) -> None:
        node = node_of(model, op_type)
        added = ir.node(new, [node.inputs[0]])
        added.outputs[0].name = "added"
        model.graph.insert_before(node, added)
        node.replace_input_with(0, added.outputs[0])

    return change


def left_over(model: ir.Model) -> None:
    added = ir.node("Relu", [node_of(model, "MatMul").outputs[0]])
    added.outputs[0].name = "added"
    model.graph.append(added)


def other_gate(model: ir.Model) -> None:
    """Up times sigmoid(gate), where it is gate times that."""
    node_of(model, "Sigmoid").replace_input_with(0, node_of(model, "MatMul", 5).outputs[0])


CHANGES = {
    "scale": with_attribute("Attention", "scale", 0.5),
    "softcap": with_attribute("Attention", "softcap", 30.0),
    "interleaved": with_attribute("RotaryEmbedding", "interleaved", 1),
    "circular": with_attribute("TensorScatter", "mode", "circular"),
    "axis": with_attribute("RMSNormalization", "axis", 1),
    "heads": with_attribute("RotaryEmbedding", "num_heads", 1),
    "activation": with_node_before("Sigmoid", "Relu"),
    "mask": with_node_before("And", "Not"),
    "left over": left_over,
    "gate": other_gate,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_what_is_not_exactly_known_is_refused(change: Any, published: Any) -> None:
    model = ir.load(published("qllama", "int4-wo"))
    assert cuda_decoder(ir.load(published("qllama", "int4-wo")), FLOAT) is not None
    change(model)
    assert cuda_decoder(model, FLOAT) is None


def test_scales_that_float16_would_round_away_are_refused(
    published: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of each layer's o, divided as the residual stream is, is below the least."""
    path = published("qllama", "int4-wo")
    narrow = ir.DataType.FLOAT16
    assert cuda_decoder(ir.load(path), narrow) is not None
    monkeypatch.setattr(module, "LEAST_SCALE", 1.0)
    assert cuda_decoder(ir.load(path), narrow) is None
    assert cuda_decoder(ir.load(path), FLOAT) is not None


def test_heads_that_attention_does_not_take_are_refused(tmp_path: Path) -> None:
    write_family(tmp_path / "qwen3", "qwen3")  # heads of 24
    assert cuda_decoder(ir.load(export(tmp_path, "qwen3", "fp32")), FLOAT) is None


def test_a_cache_that_grows_has_no_such_graph(tmp_path: Path) -> None:
    path = export(tmp_path, "qllama", "int4-wo", cache_capacity=None)
    assert cuda_decoder(ir.load(path), FLOAT) is None
    assert not open_artifact(path.parent).has("decoder.cuda.onnx")


# --- mistakes are seen ---------------------------------------------------------------------------


def swap_values_and_keys(model: ir.Model) -> None:
    joined = next(n for n in model.graph if n.op_type == "Concat" and len(n.inputs) == 3)
    key, value = joined.inputs[1:]
    joined.replace_input_with(1, value)
    joined.replace_input_with(2, key)


def swap_gate_and_up(model: ir.Model) -> None:
    gate, up = (next(n for n in model.graph if n.name == f"layers.0.{x}") for x in ("gate", "up"))
    weights = gate.inputs[1], up.inputs[1]
    gate.replace_input_with(1, weights[1])
    up.replace_input_with(1, weights[0])
    model.graph.sort()


def forget_the_divisor(model: ir.Model) -> None:
    node_of(model, "SkipSimplifiedLayerNormalization").attributes["epsilon"] = ir.AttrFloat32(
        "epsilon", 1.0
    )


MISTAKES = {
    "values for keys": swap_values_and_keys,
    "gate": swap_gate_and_up,
    "epsilon": forget_the_divisor,
}


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_shows_in_the_comparison(mistake: Any, published: Any) -> None:
    path = published("qllama", "int4-wo")
    fused = cuda_decoder(ir.load(path), FLOAT, divisor=16.0)
    assert fused is not None
    mistake(fused)
    assert largest_difference(generated(path, fused), generated(path, None)) > 1e-3


# --- compiling -----------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int4-wo"])
def test_compiling_writes_and_verifies_it(precision: str, tmp_path: Path) -> None:
    path = export(tmp_path, "qllama", precision, verify="auto")
    assert open_artifact(path.parent).has("decoder.cuda.onnx")


@pytest.mark.parametrize("kind", ["qllama", "qwen3"])
@pytest.mark.parametrize("precision", ["bf16", "int4-wo"])
def test_a_large_one_is_compared_block_by_block(
    kind: str, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A block alone is rewritten as the whole is, and a mistake in it is seen."""
    monkeypatch.setattr("internvl_edge.compiler.steps.verify.MAX_WHOLE_NBYTES", 0)
    export(tmp_path, kind, precision, verify="auto")
    written = cuda_decoder

    def wrong(model: ir.Model, dtype: ir.DataType, divisor: float) -> ir.Model | None:
        fused = written(model, dtype, divisor)
        assert fused is not None
        swap_gate_and_up(fused)
        return fused

    monkeypatch.setattr("internvl_edge.compiler.oracle.run_graph.cuda_decoder", wrong)
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / kind).symlink_to(tmp_path / kind)
    with pytest.raises(VerificationError, match=r"decoder\.cuda\.onnx, block 0"):
        export(tmp_path / "again", kind, precision, verify="auto")


def test_float32_has_none(tmp_path: Path) -> None:
    path = export(tmp_path, "qllama", "fp32")
    assert not open_artifact(path.parent).has("decoder.cuda.onnx")

"""Graphs in ONNX Runtime's own operators, against the published ones; and what is not rewritten."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from support.checkpoints import TINY, write_internvl, write_vit

from internvl_edge import compiler
from internvl_edge.artifact.components import cuda_graph
from internvl_edge.artifact.open import open_artifact
from internvl_edge.compiler import ExportOptions
from internvl_edge.compiler.steps import provider_graphs
from internvl_edge.errors import VerificationError
from internvl_edge.export.config.checkpoint import VisionConfig
from internvl_edge.export.graph.providers.tower import take_cuda_form, take_patches
from internvl_edge.runtime.ort import choice
from internvl_edge.runtime.ort import session as sessions
from internvl_edge.runtime.ort.options import CPU, OrtOptions
from internvl_edge.runtime.ort.session import OrtSession, open_component
from internvl_edge.types import Array

VISIONS = {
    "6b": TINY.vision,
    "300m": replace(TINY.vision, norm_type="layer_norm", qk_normalization=False, qkv_bias=True),
}
TEXTS = ("image_embed", "image_queries", "text_embed", "matcher")
CLOSE = 1e-5  # of the largest value


def export_vit(folder: Path, vision: VisionConfig, precision: str, **options: object) -> Path:
    write_vit(folder / "checkpoint", vision, seed=1)
    chosen = ExportOptions(
        checkpoint=folder / "checkpoint",
        out=folder / "out",
        precision=precision,
        verify="none",
    )
    compiler.export(replace(chosen, **options))  # type: ignore[arg-type]
    return folder / "out"


@pytest.fixture(scope="module")
def vits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("vits")
    return {name: export_vit(folder / name, vision, "fp32") for name, vision in VISIONS.items()}


def feeds_of(session: OrtSession) -> dict[str, Array]:
    """Noise, ids and a mask with padding, for two rows."""
    rng, feeds = np.random.default_rng(0), dict[str, Array]()
    for name, spec in session.inputs.items():
        shape = [n if isinstance(n, int) else {"batch": 2}.get(n, 6) for n in spec.shape]
        if name == "attention_mask":
            feeds[name] = np.tri(2, 6, 3, dtype=np.int64)
        elif spec.dtype == "int64":
            feeds[name] = rng.integers(3, 300, shape)
        else:
            feeds[name] = rng.standard_normal(shape).astype(spec.dtype)
    return feeds


def require_same(published: Path, other: Path) -> None:
    with OrtSession(published) as one, OrtSession(other) as two:
        feeds = feeds_of(one)
        expected, found = one.run(feeds), two.run(feeds)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=0, atol=CLOSE * np.abs(values).max())


def operators(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in ir.load(path).graph)


@pytest.mark.parametrize("kind", VISIONS)
def test_a_tower_computes_the_same_in_fewer_operators(vits: dict[str, Path], kind: str) -> None:
    """Biases, gains and LayerScale are random: none of them could be lost."""
    out = vits[kind]
    require_same(out / "vision.onnx", out / cuda_graph("vision"))
    found, depth = operators(out / cuda_graph("vision")), VISIONS[kind].num_hidden_layers
    skip = {"6b": "SkipSimplifiedLayerNormalization", "300m": "SkipLayerNormalization"}[kind]
    assert found[skip] == 2 * depth - 1, "all but the first, which reads the embeddings"
    assert found["FusedMatMul"] == 4 * depth + 1, "and the patches"
    assert found["MultiHeadAttention"] == depth
    assert not {"Conv", "MatMul", "Mul", "Attention", "LayerNormalization"} & (
        found.keys() - ({"LayerNormalization"} if kind == "300m" else set())
    )
    assert "vision.cuda.onnx" in open_artifact(out).manifest.files


def test_attention_may_stay_what_it_is(vits: dict[str, Path]) -> None:
    model = ir.load(vits["6b"] / "vision.onnx")
    assert take_cuda_form(model, multi_head=False)
    path = vits["6b"] / "plain.onnx"
    ir.save(model, path)
    require_same(vits["6b"] / "vision.onnx", path)
    assert operators(path)["Attention"] == TINY.vision.num_hidden_layers
    path.unlink()


@pytest.mark.slow
def test_language_towers_and_heads_too(tmp_path: Path) -> None:
    checkpoint = write_internvl(tmp_path / "checkpoint", seed=1).path
    out = tmp_path / "out"
    components = (*TEXTS, "image_pool", "decoder")
    options = ExportOptions(checkpoint=checkpoint, out=out, components=components, verify="none")
    compiler.export(options)
    for name in TEXTS:
        require_same(out / f"{name}.onnx", out / cuda_graph(name))
    assert not any((out / cuda_graph(name)).exists() for name in ("image_pool", "decoder"))
    masked = operators(out / cuda_graph("text_embed"))
    assert masked["Attention"] and not masked["MultiHeadAttention"], "a mask is not its affair"


@pytest.mark.slow
def test_it_is_verified_in_bfloat16_and_of_weights_that_are_cast(tmp_path: Path) -> None:
    """Verification computes both graphs in float32; copied shards leave LayerScale where it is."""
    out = export_vit(tmp_path, TINY.vision, "bf16", weights="copy", verify="auto")
    assert operators(out / cuda_graph("vision"))["Mul"] == 2 * TINY.vision.num_hidden_layers
    whole = compiler.verify(out, tmp_path / "checkpoint")
    assert whole["vision"]["cosine"] > 0.999


@pytest.mark.parametrize("input_index", [1, 2, 3])
def test_verification_refuses_a_wrong_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, input_index: int
) -> None:
    """A branch, a gain or a bias of one norm is another's."""

    def wrong(model: ir.Model) -> bool:
        is_done = take_cuda_form(model)
        nodes = [n for n in model.graph if n.op_type.startswith("Skip") and len(n.outputs) == 4]
        value = nodes[1 if input_index > 1 else 0].inputs[input_index if input_index > 1 else 0]
        nodes[0].replace_input_with(input_index, value)
        return is_done

    monkeypatch.setattr(provider_graphs, "take_cuda_form", wrong)
    with pytest.raises(VerificationError, match=r"vision\.cuda\.onnx.* vision\.onnx"):
        export_vit(tmp_path, TINY.vision, "fp32", verify="auto")


@pytest.mark.slow
def test_patches_are_compared_where_blocks_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("internvl_edge.compiler.steps.verify.MAX_WHOLE_NBYTES", 0)
    export_vit(tmp_path / "sound", TINY.vision, "fp32", verify="auto")

    def wrong(graph: ir.Graph, node: ir.Node) -> bool:
        is_done = take_patches(graph, node)
        turned = next(one for one in graph if one.op_type == "Transpose")
        turned.attributes["perm"] = ir.AttrInt64s("perm", [0, 2, 4, 1, 5, 3])
        return is_done

    monkeypatch.setattr("internvl_edge.export.graph.providers.tower.take_patches", wrong)
    with pytest.raises(VerificationError, match=r"vision\.cuda\.onnx, block 0"):
        export_vit(tmp_path / "wrong", TINY.vision, "fp32", verify="auto")


def test_quantized_and_float16_graphs_have_none(tmp_path: Path) -> None:
    out = export_vit(tmp_path, TINY.vision, "fp16")
    assert not (out / cuda_graph("vision")).exists()


# --- what is not rewritten -----------------------------------------------------------------------


def node_of(model: ir.Model, op_type: str, number: int = 0) -> ir.Node:
    return [node for node in model.graph if node.op_type == op_type][number]


def set_ints(
    op_type: str, name: str, values: list[int], number: int = 0
) -> Callable[[ir.Model], None]:
    def change(model: ir.Model) -> None:
        node_of(model, op_type, number).attributes[name] = ir.AttrInt64s(name, values)

    return change


def set_int(op_type: str, name: str, value: int, number: int = 0) -> Callable[[ir.Model], None]:
    def change(model: ir.Model) -> None:
        node_of(model, op_type, number).attributes[name] = ir.AttrInt64(name, value)

    return change


def narrow_a_gain(model: ir.Model) -> None:
    gain = model.graph.initializers["vision_model.encoder.layers.1.norm2.weight"]
    gain.type = ir.TensorType(ir.DataType.FLOAT16)


def widen_a_sum(model: ir.Model) -> None:
    added = node_of(model, "RMSNormalization", 3).inputs[0]
    assert added is not None
    added.shape = ir.Shape(["batch", 1, 64])


def take_norms_away(model: ir.Model) -> None:
    for node in list(model.graph):
        if node.op_type == "RMSNormalization":
            node.outputs[0].replace_all_uses_with(node.inputs[0])  # type: ignore[arg-type]
            model.graph.remove(node, safe=True)


def reshape_otherwise(model: ir.Model) -> None:
    node = node_of(model, "Reshape")
    node.outputs[0].shape = ir.Shape(["batch", 64, 2, 2])


CHANGES: dict[str, Callable[[ir.Model], None]] = {
    "overlapping patches": set_ints("Conv", "strides", [7, 7]),
    "padded patches": set_ints("Conv", "pads", [1, 1, 1, 1]),
    "patches in groups": set_int("Conv", "group", 3),
    "dilated patches": set_ints("Conv", "dilations", [2, 2]),
    "patches in another order": set_ints("Transpose", "perm", [0, 1, 2]),
    "patches in rows": reshape_otherwise,
    "a norm of another axis": set_int("RMSNormalization", "axis", 1, 3),
    "statistics of another type": set_int("RMSNormalization", "stash_type", 10, 3),
    "a weight as it is": set_ints("Transpose", "perm", [0, 1], 1),
    "types that differ": narrow_a_gain,
    "a sum that is broadcast": widen_a_sum,
    "no norm of a sum": take_norms_away,
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_graphs_are_not_rewritten(vits: dict[str, Path], change: str) -> None:
    model = ir.load(vits["6b"] / "vision.onnx")
    CHANGES[change](model)
    assert not take_cuda_form(model)


@pytest.mark.parametrize(
    ("name", "value"), [("is_causal", 1), ("kv_num_heads", 2), ("qk_matmul_output_mode", 1)]
)
def test_other_attention_stays(vits: dict[str, Path], name: str, value: int) -> None:
    model = ir.load(vits["6b"] / "vision.onnx")
    set_int("Attention", name, value)(model)
    assert take_cuda_form(model)
    found = Counter(node.op_type for node in model.graph)
    assert (found["Attention"], found["MultiHeadAttention"]) == (1, 1)


# --- at run time ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "options", "expected"),
    [
        ("cuda", OrtOptions(), "vision.cuda.onnx"),
        ("cuda", OrtOptions(contrib=False), "vision.onnx"),
        ("cuda", OrtOptions(gpu_provider="tensorrt"), "vision.onnx"),
        ("cpu", OrtOptions(), "vision.onnx"),
    ],
    ids=["cuda", "contrib off", "tensorrt", "cpu"],
)
def test_only_the_cuda_provider_opens_it(
    vits: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    options: OrtOptions,
    expected: str,
) -> None:
    providers = [CPU] if device == "cpu" else [("CUDAExecutionProvider", {}), CPU]
    monkeypatch.setattr(choice, "choose_providers", lambda *_: providers)
    opened: list[str] = []
    monkeypatch.setattr(sessions, "OrtSession", lambda path, **_: opened.append(path.name))
    open_component(open_artifact(vits["6b"]), "vision", device=device, options=options)
    assert opened == [expected]


def test_a_directory_without_it_still_opens(
    vits: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = open_artifact(vits["6b"])
    manifest = artifact.manifest
    files = {name: file for name, file in manifest.files.items() if ".cuda." not in name}
    monkeypatch.setattr(type(artifact), "manifest", replace(manifest, files=files), raising=False)
    monkeypatch.setattr(choice, "choose_providers", lambda *_: [("CUDAExecutionProvider", {})])
    opened: list[str] = []
    monkeypatch.setattr(sessions, "OrtSession", lambda path, **_: opened.append(path.name))
    open_component(artifact, "vision", device="cuda")
    assert opened == ["vision.onnx"]

"""Weights alone in few bits: compiled, run, verified, and mixed with 8 bits in the other tower."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from safetensors.numpy import load_file
from support.checkpoints import (
    CHAT,
    Written,
    write_chat,
    write_chat_tokenizer,
    write_internvl,
    write_vit,
)

from internvl_edge import compiler
from internvl_edge.artifact.open import Artifact
from internvl_edge.compiler import ExportOptions
from internvl_edge.errors import UsageError, VerificationError
from internvl_edge.export.checkpoint.checkpoint import open_checkpoint
from internvl_edge.quantize.lint import is_clean, lint
from internvl_edge.quantize.numerics.int4 import block_of, dequantize_blocks, rounded, unpack
from internvl_edge.quantize.recipe import recipe_for
from internvl_edge.runtime.ort.options import OrtOptions
from internvl_edge.runtime.ort.session import OrtSession

pytestmark = pytest.mark.slow

MIXED = "vision=int8,decoder=int4-wo"
LANGUAGE = ("text_embed", "matcher", "decoder")
LAYER = "qllama.model.layers.1.self_attn.o_proj"  # nothing can be folded into it


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: Any) -> Written:
    return write_internvl(tmp_path_factory.mktemp("c") / "tiny")


def exported(tiny: Written, pictures: Path, out: Path, precision: str, **more: Any) -> Artifact:
    options = ExportOptions(
        checkpoint=tiny.path, out=out, precision=precision, calibration=pictures, **more
    )
    return compiler.export(options)


@pytest.fixture(scope="module", params=["int8-wo", "int4-wo", MIXED])
def artifact(request: Any, tiny: Written, pictures: Path, tmp_path_factory: Any) -> Artifact:
    out = tmp_path_factory.mktemp("o") / "out"
    return exported(tiny, pictures, out, request.param, components=("vision", *LANGUAGE))


def operators(path: Path, prefix: str) -> list[str]:
    graph = ir.load(path).graph
    return [n.op_type for n in graph if n.op_type.endswith("Linear") and prefix in str(n.name)]


def test_only_weights_of_the_language_model_are_dequantized(artifact: Artifact) -> None:
    for name in LANGUAGE:
        found = operators(artifact.onnx_path(name), "")
        assert set(found) == {"DequantizeLinear"} and len(found) > 10
    is_mixed = artifact.manifest.precision == MIXED
    assert ("QuantizeLinear" in operators(artifact.onnx_path("vision"), "")) == is_mixed


def test_graphs_keep_every_rule(artifact: Artifact) -> None:
    for path in artifact.path.glob("*.onnx"):
        if path.name.endswith(".u8.onnx"):  # of CPUs, not of builders
            continue
        assert is_clean(lint(path)), path.name


def test_stored_weights_are_the_checkpoints_rounded(artifact: Artifact, tiny: Written) -> None:
    if artifact.manifest.precision == MIXED:
        pytest.skip("rotated before it is rounded; the simulation of verify covers it")
    weight = tiny.state[f"{LAYER}.weight"].numpy()
    stored = load_file(artifact.path / "weights.safetensors")
    values, scales = stored[f"{LAYER}.weight"], stored[f"{LAYER}.weight_scale"].T
    if artifact.manifest.precision == "int4-wo":
        found = dequantize_blocks(unpack(values, weight.shape[::-1]).T, scales)
        expected = rounded(weight, "int4", block_of(weight.shape[1], 128))
        assert values.nbytes == weight.size // 2
    else:
        found = values.T * scales[:, None]
        expected = rounded(weight, "int8", 0)
    np.testing.assert_array_equal(found, expected)


def test_a_directory_can_be_verified_again(artifact: Artifact, tiny: Written) -> None:
    figures = compiler.verify(artifact.path, tiny.path)
    assert figures["decoder"]["simulated_sqnr_db"] > 60
    assert figures["decoder"]["sqnr_db"] > (20 if artifact.manifest.precision == "int8-wo" else 5)


def test_a_wrong_scale_is_caught(artifact: Artifact, tiny: Written, tmp_path: Path) -> None:
    """A scale off by a half in one layer of three must not pass for rounding."""
    weights = artifact.path / "weights.safetensors"
    kept = weights.read_bytes()
    size = int.from_bytes(kept[:8], "little")
    start, end = json.loads(kept[8 : 8 + size])[f"{LAYER}.weight_scale"]["data_offsets"]
    scales = np.frombuffer(kept, np.float32)[(8 + size + start) // 4 : (8 + size + end) // 4]
    changed = bytearray(kept)
    changed[8 + size + start : 8 + size + end] = (scales * np.float32(1.5)).tobytes()
    try:
        weights.write_bytes(changed)
        with pytest.raises(VerificationError, match=rf"decoder|{LAYER}\.weight: expected scales"):
            check_decoder(artifact, tiny)
    finally:
        weights.write_bytes(kept)
    check_decoder(artifact, tiny)


def check_decoder(artifact: Artifact, tiny: Written) -> None:
    from internvl_edge.compiler.oracle.checker import Checker
    from internvl_edge.compiler.source import quantization_of

    opened = open_checkpoint(tiny.path)
    size = artifact.manifest.image_size
    checker = Checker(opened, size, quantization=quantization_of(artifact, opened))
    checker.check("decoder", artifact.onnx_path("decoder"), artifact.manifest.precision)


def test_rounding_kernels_stay_near_the_exact_ones(artifact: Artifact) -> None:
    """ONNX Runtime's kernels may round x to int8: little, compared with the weights' rounding."""
    rng = np.random.default_rng(0)
    path = artifact.onnx_path("text_embed")
    ids = rng.integers(3, 300, (2, 9))
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    with OrtSession(path) as fast, OrtSession(path, options=OrtOptions(exact=True)) as exact:
        a, b = (session.run(feeds)["text_embeds"] for session in (fast, exact))
    assert np.linalg.norm(a - b) < 0.05 * np.linalg.norm(b)


def test_four_bits_take_half_of_eight(tiny: Written, pictures: Path, tmp_path: Path) -> None:
    sizes = {}
    for name in ("int8-wo", "int4-wo"):
        more: dict[str, Any] = {"verify": "none", "components": ("decoder",)}
        out = exported(tiny, pictures, tmp_path / name, name, **more)
        sizes[name] = out.manifest.components["decoder"].nbytes
    plain = 2 * 300 * 48 * 4  # embedding and head stay float32
    ratio = (sizes["int4-wo"] - plain) / (sizes["int8-wo"] - plain)
    assert 0.5 < ratio < 0.75  # a scale for each 16 inputs


def test_a_forecast_knows_the_size(
    artifact: Artifact, tiny: Written, pictures: Path, tmp_path: Path
) -> None:
    options = ExportOptions(
        checkpoint=tiny.path,
        out=tmp_path / "out",
        precision=artifact.manifest.precision,
        components=tuple(artifact.manifest.components),
        calibration=pictures,
    )
    steps = {step.name: step for step in compiler.forecast(options).steps}
    foretold = steps["weights"].disk_nbytes
    actual = artifact.manifest.files["weights.safetensors"].nbytes
    assert abs(foretold - actual) < 0.1 * actual


def test_a_tower_alone_has_no_language_model(tmp_path: Path) -> None:
    written = write_vit(tmp_path / "vit")
    options = ExportOptions(checkpoint=written.path, out=tmp_path / "out", precision="int4-wo")
    with pytest.raises(UsageError, match="int4-wo: expected linear layers to quantize, found none"):
        compiler.make_plan(options)


def test_a_recipe_file_must_be_of_the_precision(
    tiny: Written, pictures: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps({"name": "mine", "activations": None, "weights": "int4"}))
    plan = compiler.make_plan(
        ExportOptions(
            checkpoint=tiny.path, out=tmp_path / "out", precision="int4-wo", recipe=recipe
        )
    )
    assert plan.recipe is not None and plan.recipe.name == "mine"
    with pytest.raises(UsageError, match="quantizes to int4-wo, --precision int8-wo says int8-wo"):
        compiler.make_plan(
            ExportOptions(
                checkpoint=tiny.path, out=tmp_path / "out", precision="int8-wo", recipe=recipe
            )
        )


# --- the vocabulary's head ------------------------------------------------------------------------

HEAD = "qllama.lm_head.weight"


@pytest.fixture(scope="module")
def with_head(tiny: Written, pictures: Path, tmp_path_factory: Any) -> Artifact:
    """A decoder whose head is INT8; verified, as everything is that is published."""
    out = tmp_path_factory.mktemp("head") / "out"
    return exported(tiny, pictures, out, "int4-wo", components=("decoder",), head="int8")


@pytest.mark.slow
def test_a_head_in_8_bits_is_the_checkpoints_rounded(with_head: Artifact, tiny: Written) -> None:
    weight = tiny.state[HEAD].numpy()
    stored = load_file(with_head.path / "weights.safetensors")
    found = stored[HEAD].T * stored[f"{HEAD}_scale"][:, None]
    np.testing.assert_array_equal(found, rounded(weight, "int8", 0))
    assert stored[HEAD].dtype == np.int8
    assert with_head.manifest.recipe is not None and with_head.manifest.recipe["head"] == "int8"
    assert f"{HEAD}/DequantizeLinear" in {
        node.name for node in ir.load(with_head.onnx_path("decoder")).graph
    }


@pytest.mark.slow
def test_a_wrong_scale_of_a_head_is_caught(
    with_head: Artifact, tiny: Written, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(with_head.path, copy)
    tensors = load_file(copy / "weights.safetensors")
    start = json.loads(header_of(copy))[f"{HEAD}_scale"]["data_offsets"][0]
    with (copy / "weights.safetensors").open("r+b") as file:
        file.seek(8 + len(header_of(copy)) + start)
        file.write((tensors[f"{HEAD}_scale"] * np.float32(1.5)).tobytes())
    with pytest.raises(VerificationError, match=rf"decoder|{HEAD}: expected scales"):
        check_decoder(replace(with_head, path=copy), tiny)


def header_of(directory: Path) -> bytes:
    data = (directory / "weights.safetensors").read_bytes()
    return data[8 : 8 + int.from_bytes(data[:8], "little")]


def test_a_head_goes_with_a_precision_that_quantizes(tiny: Written, tmp_path: Path) -> None:
    options = ExportOptions(checkpoint=tiny.path, out=tmp_path / "out", head="int8")
    with pytest.raises(UsageError, match="--head int8 goes with a precision that quantizes"):
        compiler.make_plan(options)


def test_a_head_that_is_not_there_is_refused(tmp_path: Path) -> None:
    written = write_vit(tmp_path / "vit")
    options = ExportOptions(
        checkpoint=written.path, out=tmp_path / "out", precision="int8", head="int8"
    )
    with pytest.raises(UsageError, match="expected a vocabulary head of its own"):
        compiler.make_plan(options)


def test_a_head_that_is_too_small_stays_as_it_is(tmp_path: Path, pictures: Path) -> None:
    """A linear layer of fewer inputs than a recipe quantizes, as the towers' are."""
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1}
    narrow = replace(CHAT, llama=replace(CHAT.llama, hidden_size=8, **heads))
    written = write_chat(tmp_path / "chat", narrow)
    write_chat_tokenizer(written.path)
    with pytest.raises(UsageError, match=r"--head int8: expected 16 inputs .* found 8"):
        compiler.make_plan(
            ExportOptions(
                checkpoint=written.path, out=tmp_path / "out", precision="int8", head="int8"
            )
        )
    recipe = replace(recipe_for("int8"), head="int8")
    (tmp_path / "recipe.json").write_text(json.dumps(recipe.to_json()))
    options = ExportOptions(
        checkpoint=written.path,
        out=tmp_path / "out",
        precision="int8",
        recipe=tmp_path / "recipe.json",
        calibration=pictures,
    )
    stored = load_file(compiler.export(options).path / "weights.safetensors")
    assert stored["language_model.lm_head.weight"].dtype == np.float32

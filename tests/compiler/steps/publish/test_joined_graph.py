"""The joined graph by ONNX Runtime alone, compared with the runtime on its two components."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from PIL import Image
from support.checkpoints import write_internvl, write_tokenizer

import internvl_edge
from internvl_edge.cli import run
from internvl_edge.compiler import ExportOptions, export, verify
from internvl_edge.compiler.oracle.joined import require_joined
from internvl_edge.compiler.steps.publish.joined_graph import join_towers
from internvl_edge.errors import CheckpointError, UsageError, VerificationError
from internvl_edge.export.compare import sample_feeds
from internvl_edge.export.config.checkpoint import load_config
from internvl_edge.runtime import Model
from internvl_edge.runtime.images import transform
from internvl_edge.runtime.images.transform import Transform
from internvl_edge.types import Array

LABELS = ["a red seven", "a photo of a blue three left of it", "x"]
BOTH = ("image_embed", "text_embed")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_internvl(tmp_path_factory.mktemp("clip") / "checkpoint").path
    write_tokenizer(path, normalises=False)
    (path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    (path / "added_tokens.json").write_text('{"[PAD]": 299}')
    return path


@pytest.fixture(scope="module", params=["fp32", "int8"])
def out(request: pytest.FixtureRequest, checkpoint: Path, pictures: Path) -> Path:
    path = checkpoint.parent / request.param
    if not path.exists():
        export(
            ExportOptions(
                checkpoint=checkpoint,
                out=path,
                precision=request.param,
                components=BOTH,
                calibration=pictures if request.param == "int8" else None,
                layout="optimum",
            )
        )
    return path


def photographs() -> list[Image.Image]:
    rng = np.random.default_rng(5)
    shapes = [(40, 50), (60, 33), (28, 28), (90, 31)]
    return [Image.fromarray(rng.integers(0, 256, (*shape, 3), np.uint8)) for shape in shapes]


def joined(out: Path, pixels: Array, ids: Array, mask: Array) -> dict[str, Array]:
    session = onnxruntime.InferenceSession(out / "model.onnx", providers=["CPUExecutionProvider"])
    feeds = {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}
    assert [value.name for value in session.get_inputs()] == [*feeds]
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def test_it_gives_what_the_runtime_gives(out: Path) -> None:
    with internvl_edge.load(out) as model:
        pixels = pixel_values(model, "classification")
        ids = model.tokenizer.contrastive(LABELS, pad_to="longest")
        images = model.encode_image(pixels, normalize=True)
        texts = model.encode_text(LABELS, normalize=True)
        classified = model.classify(photographs(), LABELS, templates=["{}"])
    outputs = joined(out, pixels, ids, (ids > 0).astype(np.int64))
    assert [*outputs] == ["logits_per_image", "logits_per_text", "text_embeds", "image_embeds"]
    np.testing.assert_allclose(outputs["image_embeds"], images, atol=1e-6)
    np.testing.assert_allclose(outputs["text_embeds"], texts, atol=1e-6)
    np.testing.assert_array_equal(outputs["logits_per_text"], outputs["logits_per_image"].T)
    for ranked, logits in zip(classified, outputs["logits_per_image"], strict=True):
        powers = np.exp(logits - logits.max())
        scores = dict(zip(LABELS, powers / powers.sum(), strict=True))
        assert {one["label"]: one["score"] for one in ranked} == pytest.approx(scores, abs=1e-5)


def pixel_values(model: Model, name: Transform) -> Array:
    return transform.pixel_values(photographs(), model.preprocessing, name)


def test_an_id_of_padding_is_masked_whatever_the_mask_says(out: Path) -> None:
    rng = np.random.default_rng(0)
    pixels = rng.standard_normal((2, 3, 28, 28)).astype(np.float32)
    ids = np.array([[1, 40, 0, 41, 2, 0], [1, 42, 43, 44, 45, 2]])
    right = joined(out, pixels, ids, (ids > 0).astype(np.int64))
    ones = joined(out, pixels, ids, np.ones_like(ids))
    for name, values in right.items():
        np.testing.assert_array_equal(values, ones[name])
    # and the caller's mask counts where there is an id
    short = np.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    shorter = joined(out, pixels, np.where(short, ids, 0), np.ones_like(ids))
    np.testing.assert_allclose(
        joined(out, pixels, ids, short)["text_embeds"], shorter["text_embeds"], atol=1e-6
    )


def test_it_is_both_graphs_and_ten_nodes(out: Path) -> None:
    onnx.checker.check_model(str(out / "model.onnx"), full_check=False)
    graph = ir.load(out / "model.onnx").graph
    suffix = ".u8.onnx" if (out / "text_embed.u8.onnx").exists() else ".onnx"
    parts = Counter[str]()
    for name in BOTH:
        parts += Counter(node.op_type for node in ir.load(out / f"{name}{suffix}").graph)
    whole = Counter(node.op_type for node in graph)
    new = {"Greater": 1, "Cast": 1, "Mul": 2, "ReduceL2": 2, "Max": 2, "Div": 2}
    assert whole - parts == Counter(new | {"Transpose": 2, "MatMul": 1})
    assert not parts - whole
    sizes = {
        tower: {
            d.value
            for node in graph
            if (node.name or "").startswith(tower)
            for output in node.outputs
            for d in output.shape or ()
            if not isinstance(d, int)
        }
        for tower in ("image.", "text.")
    }
    assert all(sizes.values())
    assert not sizes["image."] & sizes["text."]


def test_int8_is_joined_from_the_graphs_that_no_cpu_computes_wrongly(out: Path) -> None:
    flips = [node for node in ir.load(out / "model.onnx").graph if node.op_type == "BitwiseXor"]
    assert bool(flips) == (out.name == "int8")


@pytest.mark.slow  # it imports transformers
def test_transformers_reads_pictures_and_texts_as_we_do(out: Path) -> None:
    transformers = pytest.importorskip("transformers")
    processor = transformers.AutoImageProcessor.from_pretrained(out)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    config = transformers.AutoConfig.from_pretrained(out)
    texts = [*LABELS, "</s> <s> <unk>", "  two  spaces", "日本"]
    with internvl_edge.load(out) as model:
        theirs = processor(photographs(), return_tensors="np")["pixel_values"]
        np.testing.assert_array_equal(theirs, pixel_values(model, "clip"))
        ids = model.tokenizer.contrastive(texts, pad_to="longest")
        record = model.artifact.manifest.components["text_embed"]
    given = tokenizer(texts, padding=True)
    assert given["input_ids"] == ids.tolist()
    assert given["attention_mask"] == (ids > 0).astype(int).tolist()
    assert [*given] == ["input_ids", "attention_mask"]
    assert config.model_type == "clip"
    assert config.projection_dim == record.outputs[0].shape[-1]
    assert config.vision_config.image_size == 28


def test_the_directory_is_complete_and_is_ours(
    out: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = internvl_edge.artifact.open_artifact(out).manifest
    assert {"model.onnx", "config.json", "tokenizer.json"} <= {*manifest.files}
    assert "added_tokens.json" not in manifest.files  # of the slow tokenizer
    assert "ORTModelForZeroShotImageClassification" in (out / "README.md").read_text()
    settings = json.loads((out / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert run(["inspect", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["precision"] == out.name
    assert run(["export", str(out), "-o", str(out.parent / "again")]) == 3
    assert "is a compiled directory" in capsys.readouterr().err


def test_verify_compares_it_again(out: Path, checkpoint: Path, tmp_path: Path) -> None:
    if out.name == "int8":
        pytest.skip("one precision is enough")
    verify(out, checkpoint)
    copy = tmp_path / "copy"
    shutil.copytree(out, copy)
    model = join_towers(copy)
    scale = model.graph.initializers["scale"]
    scale.const_value = ir.tensor(np.array(99.9, np.float32), name="scale")
    ir.save(model, copy / "model.onnx")
    feeds = sample_feeds(load_config(checkpoint), 28)
    require_joined(out, feeds)
    with pytest.raises(VerificationError, match=r"model\.onnx, output 'logits_per_image'"):
        require_joined(copy, feeds)


# --- refusals ------------------------------------------------------------------------------------


def refused(checkpoint: Path, tmp_path: Path, **options: object) -> ExportOptions:
    return ExportOptions(
        checkpoint=checkpoint,
        out=tmp_path / "out",
        layout="optimum",
        verify="none",
        **options,  # type: ignore[arg-type]
    )


def test_it_needs_both_towers(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="image_embed and text_embed among the components, found"):
        export(refused(checkpoint, tmp_path, components=("vision", "text_embed")))


def test_it_takes_normalised_values(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="leave --input uint8 out"):
        export(refused(checkpoint, tmp_path, components=BOTH, input="uint8"))


def test_it_needs_a_tokenizer_that_can_be_said(checkpoint: Path, tmp_path: Path) -> None:
    copy = tmp_path / "checkpoint"
    shutil.copytree(checkpoint, copy)
    write_tokenizer(copy)
    with pytest.raises(CheckpointError, match="normalises texts"):
        export(refused(copy, tmp_path, components=BOTH))
    (copy / "tokenizer.model").unlink()
    with pytest.raises(CheckpointError, match=r"expected tokenizer\.model, .* found none"):
        export(refused(copy, tmp_path, components=BOTH))
    assert not (tmp_path / "out").exists()


def test_there_is_one_such_layout(checkpoint: Path, tmp_path: Path) -> None:
    options = ExportOptions(checkpoint=checkpoint, out=tmp_path / "out", layout="clip")
    with pytest.raises(UsageError, match="layout must be one of optimum, found 'clip'"):
        export(options)

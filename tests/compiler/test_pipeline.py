"""From a checkpoint to a published directory that runs, and every way it is refused."""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from support.checkpoints import Written, write_internvl, write_tokenizer, write_vit
from support.gpu.fake_trt import DataType, FakeTrt, tensor

import internvl_edge
from internvl_edge import compiler
from internvl_edge.artifact import publish
from internvl_edge.artifact.open import Artifact, open_artifact
from internvl_edge.cli import run
from internvl_edge.compiler import ExportOptions
from internvl_edge.compiler.steps.engines import ENGINE_NBYTES
from internvl_edge.errors import (
    BuildError,
    CalibrationError,
    CheckpointError,
    InternVLError,
    UsageError,
    VerificationError,
)
from internvl_edge.export.checkpoint.load import load_reference
from internvl_edge.export.models import InternVL
from internvl_edge.quantize.calibration.images import CalibrationSet
from internvl_edge.quantize.graph import qdq
from internvl_edge.quantize.numerics import formats
from internvl_edge.quantize.recipe import recipe_for

pytestmark = pytest.mark.slow

FAST = ("vision", "image_pool")  # the components that trace fastest


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: Any) -> Written:
    written = write_internvl(tmp_path_factory.mktemp("c") / "tiny", dtype=torch.bfloat16, shards=2)
    write_tokenizer(written.path)
    return written


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: Any) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for i in range(6):
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), np.uint8)).save(folder / f"{i}.png")
    (folder / "captions.txt").write_text("a red seven\na blue three\n" * 3)
    return folder


@pytest.fixture(scope="module")
def int8(tiny: Written, pictures: Path, tmp_path_factory: Any) -> Artifact:
    out = tmp_path_factory.mktemp("o") / "int8"
    options = ExportOptions(checkpoint=tiny.path, out=out, precision="int8", calibration=pictures)
    return compiler.export(options)


def options(tiny: Written, out: Path, **changes: Any) -> ExportOptions:
    return replace(ExportOptions(checkpoint=tiny.path, out=out, components=FAST), **changes)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_export(tiny: Written, tmp_path: Path, precision: str) -> None:
    artifact = compiler.export(options(tiny, tmp_path / "out", precision=precision))
    assert list(artifact.manifest.components) == list(FAST)
    for record in artifact.manifest.components.values():
        assert record.verification is not None
        assert record.verification["cosine"] > 0.99
    listed = {*artifact.manifest.files, "manifest.json"}
    assert {p.name for p in artifact.path.iterdir()} == listed
    assert compiler.verify(artifact.path, tiny.path).keys() == set(FAST)


def test_a_quantized_directory_answers_like_the_original(
    tiny: Written, pictures: Path, int8: Artifact
) -> None:
    reference = load_reference(tiny.path)
    assert isinstance(reference, InternVL)
    rng = np.random.default_rng(5)
    pixels = rng.standard_normal((3, 3, 28, 28)).astype(np.float32)
    with internvl_edge.load(int8.path) as model, torch.inference_mode():
        for mode in ("c", "g"):
            expected = reference.encode_image(torch.from_numpy(pixels), mode).numpy()
            assert formats.sqnr_db(expected, model.encode_image(pixels, mode=mode)) > 15
        ids = model.tokenizer.contrastive(["a red seven", "a blue three"])
        expected = reference.encode_text(torch.from_numpy(ids)).numpy()
        texts = model.encode_text(["a red seven", "a blue three"])
        assert formats.sqnr_db(expected, texts) > 12
        assert model.match(sorted(pictures.glob("*.png"))[:2], ["a", "b"]).shape == (2,)


def test_weights_are_stored_once_and_in_8_bits(tiny: Written, int8: Artifact) -> None:
    (weights,) = [n for n in int8.manifest.files if n.endswith(".safetensors")]
    stored = int8.manifest.files[weights].nbytes
    parameters = sum(t.numel() for t in tiny.state.values())
    # bf16 would be 2, and every component apart far more; un-rotation and patches are float32, and
    # the language model's head is what it was
    head = tiny.state["qllama.lm_head.weight"].numel()
    assert stored - 4 * head < 1.9 * (parameters - head)
    graphs = [n for n in int8.manifest.files if n.endswith(".onnx")]
    expected = {f"{name}{end}" for name in int8.manifest.components for end in ("", ".fp16")}
    expected |= {f"{name}.u8" for name in int8.manifest.components if name != "image_pool"}
    assert {name.removesuffix(".onnx") for name in graphs} == expected


def test_no_path_of_this_machine_is_written(int8: Artifact, tiny: Written) -> None:
    for file in int8.path.rglob("*"):
        if file.is_file():
            assert str(tiny.path.parent).encode() not in file.read_bytes(), file


def test_the_same_input_gives_the_same_bytes(tiny: Written, pictures: Path, tmp_path: Path) -> None:
    hashes = []
    for name in ("a", "b"):
        chosen = options(
            tiny, tmp_path / name, precision="int8", calibration=pictures, verify="none"
        )
        artifact = compiler.export(chosen)
        hashes.append({n: f.sha256 for n, f in artifact.manifest.files.items()})
    assert hashes[0] == hashes[1]


def test_linked_weights_are_the_checkpoints_own(tiny: Written, tmp_path: Path) -> None:
    chosen = options(tiny, tmp_path / "out", precision="fp16", weights="link")
    artifact = compiler.export(chosen)
    for shard in tiny.path.glob("*.safetensors"):
        assert (artifact.path / shard.name).samefile(shard)
    assert not (artifact.path / "weights.safetensors").exists()


def test_another_resolution(tiny: Written, tmp_path: Path) -> None:
    artifact = compiler.export(options(tiny, tmp_path / "out", image_size=42))
    (spec,) = artifact.manifest.components["vision"].inputs
    assert spec.shape == ("batch", 3, 42, 42)
    reference = load_reference(tiny.path)
    pixels = np.random.default_rng(1).standard_normal((2, 3, 42, 42)).astype(np.float32)
    with internvl_edge.open_session(artifact.path, "vision") as session:
        actual = session.run({"pixel_values": pixels})["last_hidden_state"]
    with torch.inference_mode():
        expected = reference.vision_model(torch.from_numpy(pixels)).numpy()
    np.testing.assert_allclose(actual, expected, atol=1e-4)


def test_a_bare_tower(tmp_path: Path, pictures: Path) -> None:
    written = write_vit(tmp_path / "vit")
    chosen = ExportOptions(
        checkpoint=written.path, out=tmp_path / "out", precision="int8", calibration=pictures
    )
    assert list(compiler.export(chosen).manifest.components) == ["vision"]


def test_forecast_writes_nothing_and_knows_the_size(
    tiny: Written, pictures: Path, tmp_path: Path, int8: Artifact
) -> None:
    chosen = ExportOptions(
        checkpoint=tiny.path, out=tmp_path / "out", precision="int8", calibration=pictures
    )
    forecast = compiler.forecast(chosen)
    assert not (tmp_path / "out").exists()
    weights = next(step for step in forecast.steps if step.name == "weights")
    actual = int8.manifest.files["weights.safetensors"].nbytes
    assert 0.9 * actual < weights.disk_nbytes < 1.3 * actual


def test_forecast_of_engines_counts_what_each_component_reads(
    tiny: Written, pictures: Path, tmp_path: Path, int8: Artifact
) -> None:
    chosen = ExportOptions(
        checkpoint=tiny.path,
        out=tmp_path / "out",
        precision="int8",
        calibration=pictures,
        targets=("tensorrt-rtx",),
    )
    steps = compiler.forecast(chosen).steps
    builds = {step.name: step.disk_nbytes for step in steps if step.name.startswith("build ")}
    read = {f"build {name}": c.nbytes for name, c in int8.manifest.components.items()}
    assert builds.keys() == read.keys()
    for name, nbytes in builds.items():
        assert 0.95 * read[name] < nbytes - ENGINE_NBYTES < 1.05 * read[name], name
    alone = compiler.forecast(replace(chosen, components=("vision",))).steps[-1]
    assert alone.disk_nbytes == builds["build vision"]


# --- mutations of the numerics must not be published -----------------------------------------


def flip_axis(monkeypatch: pytest.MonkeyPatch) -> None:
    original = formats.quantize

    def by_input(x: Any, scale: Any, fmt: Any, axis: Any = None) -> Any:
        if axis is None:
            return original(x, scale, fmt)
        return original(x, np.resize(scale, x.shape[1]), fmt, 1)

    monkeypatch.setattr(formats, "quantize", by_input)


def double_stored_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    original = formats.quantize

    def halved(x: Any, scale: Any, fmt: Any, axis: Any = None) -> Any:
        return original(x, 2 * np.asarray(scale), fmt, axis)

    monkeypatch.setattr(formats, "quantize", halved)


def double_activation_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    original = qdq.QuantizedLinear

    def doubled(**fields: Any) -> Any:
        return original(**{**fields, "activation_scale": 4 * fields["activation_scale"]})

    monkeypatch.setattr("internvl_edge.compiler.steps.graphs.QuantizedLinear", doubled)


def drop_a_dequantization(monkeypatch: pytest.MonkeyPatch) -> None:
    original = qdq.insert_qdq

    def without_one(model: ir.Model, linears: Any) -> int:
        count = original(model, linears)
        node = next(n for n in model.graph if str(n.name).endswith("qkv.weight/DequantizeLinear"))
        cast = ir.node("Cast", [node.inputs[0]], {"to": int(ir.DataType.FLOAT)})
        model.graph.insert_before(node, cast)
        for reader, index in list(node.outputs[0].uses()):
            reader.replace_input_with(index, cast.outputs[0])
        model.graph.remove(node, safe=True)
        return count

    monkeypatch.setattr("internvl_edge.compiler.steps.graphs.insert_qdq", without_one)


@pytest.mark.parametrize(
    "mutate", [flip_axis, double_stored_scales, double_activation_scales, drop_a_dequantization]
)
def test_a_broken_quantizer_is_caught(
    tiny: Written, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mutate: Any
) -> None:
    mutate(monkeypatch)
    chosen = options(
        tiny, tmp_path / "out", precision="int8", calibration=pictures, components=("vision",)
    )
    with pytest.raises(VerificationError):
        compiler.export(chosen)
    assert not (tmp_path / "out").exists()


def test_samples_of_the_callers_own(tiny: Written, tmp_path: Path) -> None:
    asked = []

    def draw(count: int, seed: int) -> CalibrationSet:
        asked.append((count, seed))
        images = list(np.random.default_rng(seed).integers(0, 256, (3, 40, 50, 3), np.uint8))
        return CalibrationSet.from_arrays(images, ["a red seven"], name="mine")

    chosen = options(tiny, tmp_path / "out", precision="int8", samples=draw, verify="none")
    artifact = compiler.export(chosen)
    recipe = recipe_for("int8")
    assert {*asked} == {(recipe.num_samples, recipe.seed)}
    used = artifact.manifest.source["calibration"]
    assert (used["name"], used["samples"]) == ("mine", 3)


def test_a_wrong_weight_is_caught(
    tiny: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from internvl_edge.compiler.steps import weights as stored

    original = stored.read_tensor

    def transposed(plan: Any, name: str) -> Any:
        values = original(plan, name)
        return values.T if name.endswith("layers.0.attn.proj.weight") else values

    monkeypatch.setattr(stored, "read_tensor", transposed)
    with pytest.raises(VerificationError, match="vision"):
        compiler.export(options(tiny, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


# --- refusals, before any work ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"precision": "int7"}, UsageError, "fp32, fp16, bf16, int8, fp8"),
        ({"components": ("visoin",)}, UsageError, "visoin"),
        ({"targets": ("onnx", "openvino")}, UsageError, "target must be one of"),
        ({"image_size": 30}, UsageError, "the nearest are 28 and 42"),
        ({"image_size": -14}, UsageError, "positive multiple"),
        ({"precision": "int8", "weights": "link"}, UsageError, "leave --weights out"),
        ({"recipe": Path("recipe.json")}, UsageError, "use int8, fp8"),
        ({"precision": "int8", "calibration": Path("nowhere")}, CalibrationError, "nowhere"),
        ({"checkpoint": Path("nowhere")}, CheckpointError, "does not exist"),
    ],
)
def test_refusals(
    tiny: Written, tmp_path: Path, changes: dict[str, Any], error: type, message: str
) -> None:
    with pytest.raises(error, match=message):
        compiler.export(options(tiny, tmp_path / "out", **changes))
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written(
    tiny: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ExportOptions(checkpoint=tiny.path, out=tmp_path / "a" / "b" / "out")
    compiler.make_plan(options)
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    with pytest.raises(UsageError, match=f"{tmp_path} cannot be written"):
        compiler.make_plan(options)
    assert list(tmp_path.iterdir()) == []


def test_an_absurd_resolution_is_not_the_preprocessors_fault(tiny: Written, tmp_path: Path) -> None:
    (checkpoint := tmp_path / "c").mkdir()
    for file in tiny.path.iterdir():
        (checkpoint / file.name).symlink_to(file)
    (checkpoint / "preprocessor_config.json").write_text("{}")
    options = ExportOptions(checkpoint=checkpoint, out=tmp_path / "out", image_size=14 * 7000)
    with pytest.raises(UsageError, match="--image-size: expected at most 4096, found 98000"):
        compiler.make_plan(options)


def test_empty_calibration_folder(tiny: Written, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    chosen = options(tiny, tmp_path / "out", precision="int8", calibration=tmp_path / "empty")
    with pytest.raises(CalibrationError):
        compiler.export(chosen)
    assert not (tmp_path / "out").exists()


def test_weights_that_are_not_finite(tmp_path: Path) -> None:
    written = write_internvl(tmp_path / "c")
    state = dict(written.state)
    state["clip_projector.norm1_q.weight"][3] = torch.nan
    save_file(state, written.path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"norm1_q\.weight: holds NaN"):
        compiler.export(options(written, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_an_existing_directory_is_kept_without_force(tiny: Written, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("x")
    with pytest.raises(UsageError, match="--force"):
        compiler.export(options(tiny, out))
    assert (out / "precious").read_text() == "x"


def test_channels_that_are_switched_off(tmp_path: Path, pictures: Path) -> None:
    """A norm gain of zero moves nothing into the columns that it hides."""
    written = write_vit(tmp_path / "vit")
    state = dict(written.state)
    state["encoder.layers.0.norm1.weight"][5] = 0
    save_file(state, written.path / "model.safetensors")
    for precision in ("int8", "fp8"):
        chosen = ExportOptions(
            checkpoint=written.path,
            out=tmp_path / precision,
            precision=precision,
            calibration=pictures,
        )
        verification = compiler.export(chosen).manifest.components["vision"].verification
        assert verification is not None
        assert verification["simulated_sqnr_db"] > 40


def test_an_engine_that_fails_does_not_cost_the_export(
    tiny: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from internvl_edge.compiler.steps import engines

    original = engines.build_engine

    def failing(path: Path, *args: Any, component: str, **kwargs: Any) -> Any:
        if component == "image_pool":
            raise BuildError("no kernel")
        return original(path, *args, component=component, **kwargs)

    monkeypatch.setattr(engines, "build_engine", failing)
    pytest.importorskip("tensorrt_rtx", reason="the tensorrt-rtx package is not installed")
    chosen = options(tiny, tmp_path / "out", precision="fp16", targets=("tensorrt-rtx",))
    with pytest.raises(BuildError, match="is published, with 1 engine"):
        compiler.export(chosen)
    artifact = open_artifact(tmp_path / "out")
    assert [engine.component for engine in artifact.manifest.engines] == ["vision"]


OPENED: list[tuple[str, int]] = []  # paths and flags, of every file that Python opens


def _note_opened(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and isinstance(arguments[0], str | os.PathLike):
        OPENED.append((os.fspath(arguments[0]), arguments[2]))


sys.addaudithook(_note_opened)  # for good: a hook cannot be removed


@pytest.mark.parametrize("later", [False, True], ids=["with the export", "by build"])
def test_an_engine_is_hashed_while_it_is_written_and_never_read(
    tiny: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, later: bool
) -> None:
    from internvl_edge.compiler.steps import engines
    from internvl_edge.export.engine import build

    trt = FakeTrt()
    trt.inputs = [tensor("pixel_values", DataType.FLOAT, -1, 3, 28, 28)]
    for module in (engines, build):
        monkeypatch.setattr(module, "import_tensorrt", lambda _: trt)
    for name in ("sync", "sync_tree"):  # which open files too, and read nothing of them
        monkeypatch.setattr(publish, name, lambda _: None)
    opened = "internvl_edge.compiler.compile.open_artifact"
    monkeypatch.setattr(opened, lambda _, hash_files: None)  # for their sizes
    OPENED.clear()
    chosen = options(tiny, tmp_path / "out", components=("vision",), verify="none")
    if later:
        compiler.export(chosen)
        compiler.build(tmp_path / "out", ["tensorrt-rtx"])
    else:
        compiler.export(replace(chosen, targets=("tensorrt-rtx",)))
    flags = [flag for path, flag in OPENED if ".plan" in path]
    assert {flag & os.O_ACCMODE for flag in flags} == {os.O_WRONLY}, "written, and nothing else"
    artifact = open_artifact(tmp_path / "out")  # which hashes every file
    (engine,) = artifact.manifest.engines
    assert artifact.manifest.files[engine.file].nbytes == len(b"plan")


def test_force_replaces_only_what_is_complete(tiny: Written, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = compiler.export(options(tiny, out, components=("image_pool",)))
    before = first.manifest
    with pytest.raises(InternVLError):
        compiler.export(options(tiny, out, force=True, image_size=30))
    assert open_artifact(out).manifest == before
    changed = options(tiny, out, force=True, components=("image_pool",), precision="fp16")
    assert compiler.export(changed).manifest.precision == "fp16"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_verify_refuses_another_checkpoint(tiny: Written, int8: Artifact, tmp_path: Path) -> None:
    other = write_internvl(tmp_path / "other", seed=9)
    with pytest.raises(UsageError, match=r"was not made from .* of .* bytes, found .*--checkpoint"):
        compiler.verify(int8.path, other.path)


def test_verify_finds_an_edited_file(int8: Artifact, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(int8.path, copy)
    weights = copy / "weights.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    with pytest.raises(InternVLError, match=r"weights\.safetensors"):
        compiler.verify(copy)


def test_a_recipe_file_is_followed(tiny: Written, pictures: Path, tmp_path: Path) -> None:
    recipe = replace(recipe_for("int8"), name="mine", exclude=(r"mlp",), num_samples=4)
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps(recipe.to_json()))
    chosen = options(tiny, tmp_path / "out", precision="int8", calibration=pictures, recipe=file)
    artifact = compiler.export(chosen)
    assert artifact.manifest.recipe == json.loads(file.read_text())
    from internvl_edge.export.checkpoint.shards import read_header

    stored = read_header(artifact.path / "weights.safetensors")
    kinds = {name: entry.dtype for name, entry in stored.items()}
    assert kinds["vision_model.encoder.layers.0.attn.qkv.weight"] == np.int8
    assert kinds["vision_model.encoder.layers.0.mlp.fc1.weight"] != np.int8


def test_what_a_recipe_says_in_vain_is_told(
    tiny: Written, pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    count = sum(path.suffix == ".png" for path in pictures.iterdir())
    patterns = (r"mlp", r"layers\.0\.attn\.core$", r"mlp\.fc9")
    recipe = replace(recipe_for("int8"), name="mine", exclude=patterns, num_samples=count + 1)
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps(recipe.to_json()))
    command = ["export", str(tiny.path), "-o", str(tmp_path / "out"), "-p", "int8", "--dry-run"]
    assert run([*command, "--calib", str(pictures), "--recipe", str(file)]) == 0
    told = [record.getMessage() for record in caplog.records if "recipe" in record.getMessage()]
    assert len(told) == 2
    assert r"excludes 'mlp\\.fc9', which matches no linear layer" in told[0]
    assert f"{count} image(s) to calibrate on, the recipe asks for {count + 1}" in told[1]

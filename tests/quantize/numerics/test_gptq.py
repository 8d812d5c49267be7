"""GPTQ and a naive reference, what it may never do, and whole exports that round by it."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.calibration import STREAMS, calibrate
from support.checkpoints import write_internvl, write_vit

from internvl_edge import compiler
from internvl_edge.artifact.open import open_artifact
from internvl_edge.cli import run
from internvl_edge.compiler import ExportOptions
from internvl_edge.compiler.oracle.checker import Checker
from internvl_edge.compiler.search import export_auto
from internvl_edge.compiler.source import quantization_of
from internvl_edge.errors import CalibrationError, InputError, VerificationError
from internvl_edge.export.checkpoint.checkpoint import Checkpoint, open_checkpoint
from internvl_edge.export.checkpoint.shards import read_header
from internvl_edge.export.towers.streams import Samples
from internvl_edge.quantize.calibration import block as calibrating
from internvl_edge.quantize.fold import source_of
from internvl_edge.quantize.numerics import formats, gptq, int4
from internvl_edge.quantize.numerics.gptq import Factor, add_rows, change_rows, improved
from internvl_edge.quantize.numerics.weights import QuantizedWeight, quantize_weight
from internvl_edge.quantize.recipe import Recipe, recipe_for
from internvl_edge.types import Array

FORMATS = ["int8", "int4", "fp8"]
BLOCK = 16  # of INT4 here


def inputs(rows: int, columns: int, seed: int = 0, rank: int | None = None) -> Array:
    """Rows whose channels resemble each other and differ in size, the same ways for every seed."""
    kind = np.random.default_rng((columns, rank or 0))
    basis = kind.standard_normal((rank or columns // 2, columns))
    basis *= np.exp(kind.standard_normal(columns))
    rng = np.random.default_rng(seed)
    rows_of = rng.standard_normal((rows, len(basis))) @ basis
    return (rows_of + 0.3 * rng.standard_normal((rows, columns))).astype(np.float32)


def weights(outputs: int, columns: int, seed: int = 1) -> Array:
    return np.random.default_rng(seed).standard_normal((outputs, columns)).astype(np.float32)


def products(x: Array) -> Array:
    found = np.zeros((x.shape[1],) * 2, np.float32)
    add_rows(found, x)
    return found


def nearest(w: Array, fmt: str) -> tuple[Array, Array]:
    if fmt == "int4":
        return int4.quantize_blocks(w, BLOCK)
    scales = formats.weight_scale(w, fmt, 0)
    return formats.quantize(w, scales, fmt, 0), scales


def meant(values: Array, scales: Array) -> Array:
    """The weight (N, K) that values and scales stand for."""
    blocks = values.astype(np.float64).reshape(*scales.reshape(len(scales), -1).shape, -1)
    return (blocks * scales.reshape(len(scales), -1, 1)).reshape(values.shape)


def rounded(w: Array, x: Array, fmt: str) -> tuple[Array, Array, Array]:
    """Values by GPTQ, values rounded to nearest, and the scales of both."""
    values, scales = nearest(w, fmt)
    return improved(w, values, scales, fmt, Factor(products(x), "a layer")), values, scales


def output_error(x: Array, w: Array, rough: Array) -> Array:
    """‖X Ŵᵀ − X Wᵀ‖² of each output."""
    return np.square(x.astype(np.float64) @ (rough - w).T).sum(axis=0)


# --- the numbers ---------------------------------------------------------------------------------


def reference(w: Array, x: Array, fmt: str) -> Array:
    """Column by column, with the inverse of what is left of H written out for each, in float64."""
    values, scales = nearest(w, fmt)
    h = x.astype(np.float64).T @ x
    h += 0.01 * np.diag(h).mean() * np.eye(len(h))
    left = list(np.argsort(np.diag(h), kind="stable"))
    moved, found = w.astype(np.float64), values.copy()
    table = np.repeat(scales.reshape(len(w), -1), len(h) // (scales.size // len(w)), axis=1)
    while left:
        j = left[-1]
        inverse = np.linalg.inv(h[np.ix_(left, left)])
        found[:, j] = formats.quantize(moved[:, j].astype(np.float32), table[:, j], fmt, 0)
        error = moved[:, j] - found[:, j].astype(np.float64) * table[:, j]
        moved[:, left] -= np.outer(error / inverse[-1, -1], inverse[-1])
        left.pop()
    e, usual = (meant(v, scales) - w for v in (found, values))
    is_better = (e @ h * e).sum(axis=1) < (usual @ h * usual).sum(axis=1)
    is_near = np.square(e).sum(axis=1) <= 16 * np.square(usual).sum(axis=1)
    return np.where((is_better & is_near)[:, None], found, values)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("columns", [16, 48, 160])  # 160: more than a block of columns
def test_it_is_the_naive_algorithm(fmt: str, columns: int) -> None:
    x, w = inputs(4 * columns, columns), weights(24, columns)
    found, _, _ = rounded(w, x, fmt)
    np.testing.assert_array_equal(found, reference(w, x, fmt))


@given(
    fmt=st.sampled_from(FORMATS),
    rows=st.integers(1, 200),
    columns=st.sampled_from([16, 32, 80, 144]),
    rank=st.integers(1, 40),
    seed=st.integers(0, 999),
    size=st.sampled_from([1e-12, 1e-3, 1.0, 1e6]),
)
@settings(deadline=None, max_examples=60)
def test_no_output_is_worse(
    fmt: str, rows: int, columns: int, rank: int, seed: int, size: float
) -> None:
    """Than rounding to nearest, by more than the damping counts for."""
    x = inputs(rows, columns, seed, rank) * np.float32(size)
    w = weights(12, columns, seed)
    found, values, scales = rounded(w, x, fmt)
    usual = meant(values, scales)
    damping = gptq.DAMPING * np.square(x, dtype=np.float64).sum(0).mean()
    allowed = output_error(x, w, usual) + damping * np.square(usual - w).sum(1)
    assert (output_error(x, w, meant(found, scales)) <= 1.001 * allowed).all()


@given(
    fmt=st.sampled_from(FORMATS),
    columns=st.sampled_from([16, 128, 144, 272]),
    seed=st.integers(0, 99),
    size=st.floats(1e-10, 1e10),
)
@settings(deadline=None, max_examples=30)
def test_inputs_that_do_not_resemble_each_other_round_to_nearest(
    fmt: str, columns: int, seed: int, size: float
) -> None:
    w = weights(8, columns, seed)
    values, scales = nearest(w, fmt)
    identity = np.eye(columns, dtype=np.float32) * np.float32(size)
    found = improved(w, values, scales, fmt, Factor(identity, "a layer"))
    np.testing.assert_array_equal(found, values)


@pytest.mark.parametrize("fmt", FORMATS)
def test_on_inputs_not_seen(fmt: str) -> None:
    """Three quarters of the error are gone, in rows of the same kind."""
    w = weights(64, 160)
    found, values, scales = rounded(w, inputs(800, 160, rank=40), fmt)
    others = inputs(200, 160, seed=5, rank=40)
    before, after = (output_error(others, w, meant(v, scales)).sum() for v in (values, found))
    assert after < before / 4
    assert np.square(meant(found, scales) - w).sum() > np.square(meant(values, scales) - w).sum()


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("most", [1.0, 2.0, 16.0])
def test_no_row_moves_too_far(fmt: str, most: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gptq, "MAX_MOVED", most)
    w = weights(64, 160)
    found, values, scales = rounded(w, inputs(800, 160, rank=100), fmt)
    far, near = (np.square(meant(v, scales) - w).sum(axis=1) for v in (found, values))
    assert (far <= 1.0001 * most * near).all()
    assert (found != values).any() == (most > 2)


@pytest.mark.parametrize("fmt", FORMATS)
def test_dead_channels_are_rounded_to_nearest(fmt: str) -> None:
    x, w = inputs(300, 48), weights(16, 48)
    dead = [0, 7, 47]
    x[:, dead] = 0
    found, values, _ = rounded(w, x, fmt)
    np.testing.assert_array_equal(found[:, dead], values[:, dead])
    assert (found != values).any()
    found, values, _ = rounded(w, 0 * x, fmt)
    np.testing.assert_array_equal(found, values)


@pytest.mark.parametrize("damping", [1e-9, 1e-6])
def test_rows_too_few_for_a_factor(damping: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Float32 cannot tell what the damping leaves of 400 columns in 20 rows.

    At 1e-9 it depends on the CPU's kernels whether rounding to nearest is kept, which is no loss.
    """
    monkeypatch.setattr(gptq, "DAMPING", damping)
    x, w = inputs(20, 400, rank=3) + np.float32(100), weights(8, 400)
    found, values, scales = rounded(w, x, "int8")
    usual, best = (output_error(x, w, meant(v, scales)).sum() for v in (values, found))
    assert best < usual or (damping == 1e-9 and np.array_equal(found, values))


def test_spans_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = inputs(600, 300), weights(16, 300)
    found, _, _ = rounded(w, x, "int8")
    monkeypatch.setattr(gptq, "BLOCK", 7)
    assert (rounded(w, x, "int8")[0] != found).mean() < 0.01  # ties, and what follows them


def test_products_of_parts_and_of_rows_that_were_changed() -> None:
    x = inputs(700, 40)
    turn, _ = np.linalg.qr(np.random.default_rng(2).standard_normal((40, 40)))
    turn = turn.astype(np.float32)
    found = products(x[:300])
    add_rows(found, x[300:])
    np.testing.assert_allclose(found, x.T @ x, rtol=1e-4, atol=1e-2)
    change_rows(found, lambda rows: (rows / np.arange(1, 41, dtype=np.float32)) @ turn)
    changed = (x / np.arange(1, 41, dtype=np.float32)) @ turn
    np.testing.assert_allclose(found, changed.T @ changed, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("fmt", FORMATS)
def test_a_weight_as_it_is_stored(fmt: str) -> None:
    """Scales stay those of rounding to nearest; what is lost compared with the weight is told."""
    settings = {"weights": fmt, "activations": None if fmt == "int4" else fmt, "block_size": BLOCK}
    recipe = Recipe(name="r", **settings)  # type: ignore[arg-type]
    x, w = inputs(300, 48), weights(32, 48)
    found = quantize_weight(w, "a layer", recipe, Factor(products(x), "a layer"))
    plain = quantize_weight(w, "a layer", recipe)
    np.testing.assert_array_equal(found.scales, plain.scales)
    assert (found.values.dtype, found.values.shape) == (plain.values.dtype, plain.values.shape)
    values = int4.unpack(found.values, (48, 32)) if fmt == "int4" else found.values
    np.testing.assert_array_equal(values.T, rounded(w, x, fmt)[0])
    assert found.sqnr_db < plain.sqnr_db


# --- refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["GPTQ", "up", None, True, 1, ["gptq"]])
def test_a_rounding_that_is_not_known(value: Any, tmp_path: Path) -> None:
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps({"name": "mine", "rounding": value}))
    with pytest.raises(InputError, match=r"rounding must be one of \('nearest', 'gptq'\)"):
        compiler.export(ExportOptions(out=tmp_path / "out", precision="int8", recipe=file))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_products_that_are_not_finite(value: float) -> None:
    h = products(inputs(50, 16))
    h[3, 3] = value
    with pytest.raises(CalibrationError, match=r"blocks\.0\.fc1: expected finite products"):
        Factor(h, "blocks.0.fc1")


@pytest.mark.parametrize("fmt", FORMATS)
def test_a_weight_that_is_not_finite(fmt: str) -> None:
    w = weights(16, 32)
    w[2, 3] = np.nan
    recipe = Recipe(name="r", activations=None if fmt == "int4" else fmt, weights=fmt)  # type: ignore[arg-type]
    with pytest.raises(CalibrationError, match=r"fc1\.weight holds NaN"):
        quantize_weight(w, "fc1", recipe, Factor(products(inputs(50, 32)), "fc1"))


# --- blocks --------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return open_checkpoint(write_internvl(tmp_path / "checkpoint").path)


@pytest.fixture(scope="module")
def samples() -> Samples:
    generator = torch.Generator().manual_seed(4)
    pixels = torch.randn(6, 3, 28, 28, generator=generator)
    ids = torch.randint(3, 300, (6, 9), generator=generator)
    return Samples(
        pixel_values=[pixels[:4], pixels[4:]], input_ids=[ids[:4], ids[4:]], match_ids=[ids[:4]]
    )


def gptq_recipe(precision: str) -> Recipe:
    return replace(recipe_for(precision), rounding="gptq")


def test_products_are_of_activations_as_their_readers_see_them(
    checkpoint: Checkpoint, samples: Samples, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind smoothing, rotations and factors; summed over all streams of a layer."""
    expected: dict[str, Array] = {}
    streams: dict[str, int] = {}
    found: dict[str, Array] = {}
    choose_range, factor, lock = calibrating.choose_range, Factor.__init__, threading.Lock()

    def chosen(activation: Any, *args: Any) -> Any:
        result = choose_range(activation, *args)
        key = activation.group.key
        rows = result.rows.astype(np.float64)
        assert len(rows) == activation.inputs.sample._seen, "the sample holds every row"
        with lock:  # ranges are chosen in parallel
            expected[key] = expected.get(key, 0) + rows.T @ rows
            streams[key] = streams.get(key, 0) + 1
        return result

    def factorised(self: Factor, h: Array, name: str) -> None:
        found[name] = h.copy()
        factor(self, h, name)

    monkeypatch.setattr(calibrating, "choose_range", chosen)
    monkeypatch.setattr(Factor, "__init__", factorised)
    recipe = gptq_recipe("int8")
    calibrate(source_of(checkpoint, recipe), samples, recipe, STREAMS)
    assert found.keys() == expected.keys()
    assert max(streams.values()) > 1
    for name, h in found.items():
        scale = np.sqrt(np.outer(np.diag(expected[name]), np.diag(expected[name])))
        assert np.abs(h - expected[name]).max() <= 1e-3 * scale.max(), name


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["int8", "int4-wo"])
def test_blocks_come_out_the_same_again(
    precision: str, checkpoint: Checkpoint, samples: Samples
) -> None:
    recipe = gptq_recipe(precision)
    source = source_of(checkpoint, recipe)
    first, _ = calibrate(source, samples, recipe, STREAMS)
    second, _ = calibrate(source, samples, recipe, STREAMS, budget_nbytes=0)
    plain, _ = calibrate(source, samples, replace(recipe, rounding="nearest"), STREAMS)
    differ = 0
    for one, other, usual in zip(first, second, plain, strict=True):
        assert one.weights.keys() == other.weights.keys() == usual.weights.keys()
        for name, weight in one.weights.items():
            assert_same(weight, other.weights[name])
            np.testing.assert_array_equal(weight.scales, usual.weights[name].scales)
            differ += bool((weight.values != usual.weights[name].values).any())
        for name, values in one.folded.items():
            np.testing.assert_array_equal(values, other.folded[name])
    assert differ


def test_layers_that_are_left_alone(checkpoint: Checkpoint, samples: Samples) -> None:
    recipe = replace(gptq_recipe("int8"), exclude=(r"layers\.0\.", r"fc1$"))
    first, *others = calibrate(source_of(checkpoint, recipe), samples, recipe, {"image"})[0]
    assert not first.weights
    assert all("fc2" in " ".join(found.weights) for found in others)
    assert not any("fc1" in name for found in others for name in found.weights)


def assert_same(one: QuantizedWeight, other: QuantizedWeight) -> None:
    np.testing.assert_array_equal(one.values.view(np.uint8), other.values.view(np.uint8))
    np.testing.assert_array_equal(one.scales, other.scales)


def test_the_presets_round_to_nearest() -> None:
    assert {recipe_for(name).rounding for name in ("int8", "fp8", "int8-wo", "int4-wo")} == {
        "nearest"
    }


# --- whole exports -------------------------------------------------------------------------------


def recipe_file(folder: Path, precision: str) -> Path:
    path = folder / "recipe.json"
    path.write_text(json.dumps(gptq_recipe(precision).to_json()))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_an_export_with_a_recipe_from_a_file(
    precision: str, tmp_path: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, out = write_vit(tmp_path / "checkpoint").path, tmp_path / "out"
    command = ["export", str(checkpoint), "-o", str(out), "-p", precision]
    command += ["--recipe", str(recipe_file(tmp_path, precision)), "--calib", str(pictures)]
    assert run([*command, "--json"]) == 0
    manifest = open_artifact(out).manifest
    assert manifest.recipe is not None and manifest.recipe["rounding"] == "gptq"
    verification = manifest.components["vision"].verification
    assert verification is not None and verification["simulated_sqnr_db"] > 60
    assert run(["verify", str(out), "--checkpoint", str(checkpoint)]) == 0
    assert run(["bisect", str(out), "--checkpoint", str(checkpoint)]) == 0
    capsys.readouterr()


@pytest.fixture(scope="module")
def language(tmp_path_factory: Any) -> Path:
    return write_internvl(tmp_path_factory.mktemp("c") / "tiny").path


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["int8-wo", "int4-wo"])
def test_weights_alone(precision: str, language: Path, pictures: Path, tmp_path: Path) -> None:
    options = ExportOptions(
        checkpoint=language,
        out=tmp_path / "out",
        precision=precision,
        recipe=gptq_recipe(precision),
        components=("decoder",),
        calibration=pictures,
    )
    artifact = compiler.export(options)
    verification = artifact.manifest.components["decoder"].verification
    assert verification is not None and verification["simulated_sqnr_db"] > 60
    again = compiler.export(replace(options, out=tmp_path / "again", verify="none"))
    one, other = (a.file("weights.safetensors").read_bytes() for a in (artifact, again))
    assert one == other


def test_values_that_are_not_the_weights(tmp_path: Path, pictures: Path) -> None:
    """The simulation takes what is stored, and holds it against the checkpoint first."""
    checkpoint, out = write_vit(tmp_path / "checkpoint").path, tmp_path / "out"
    options = ExportOptions(
        checkpoint=checkpoint,
        out=out,
        precision="int8",
        recipe=gptq_recipe("int8"),
        calibration=pictures,
    )
    artifact = compiler.export(options)
    name = "vision_model.encoder.layers.1.mlp.fc1.weight"
    file = artifact.file("weights.safetensors")
    entry, data = read_header(file)[name], bytearray(file.read_bytes())
    values = entry.read()  # (K, N)
    values[[0, 1]] = values[[1, 0]]
    data[entry.offset : entry.offset + entry.nbytes] = values.tobytes()
    file.write_bytes(data)
    opened = open_checkpoint(checkpoint)
    quantization = quantization_of(artifact, opened)
    checker = Checker(opened, artifact.manifest.image_size, quantization=quantization)
    with pytest.raises(VerificationError, match=rf"{name}: expected values near those"):
        checker.check("vision", out / "vision.onnx", "int8")


def test_a_search_for_layers_in_16_bits(tmp_path: Path, pictures: Path) -> None:
    """``--precision auto`` runs layers as they are stored."""
    checkpoint = write_vit(tmp_path / "checkpoint").path
    options = ExportOptions(
        checkpoint=checkpoint,
        out=tmp_path / "out",
        recipe=gptq_recipe("int8"),
        calibration=pictures,
        verify="none",
    )
    artifact, found = export_auto(options, 0.5)
    assert artifact.manifest.recipe is not None
    assert artifact.manifest.recipe["rounding"] == "gptq"
    assert all(item.error > 0 for item in found.ranking)

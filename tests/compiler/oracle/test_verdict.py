"""What is held exactly, what is measured and said, and what refuses."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from PIL import Image
from support.checkpoints import TINY, Written, write_internvl, write_vit

from internvl_edge import compiler
from internvl_edge.artifact.open import Artifact
from internvl_edge.cli import run
from internvl_edge.compiler import ExportOptions
from internvl_edge.compiler.oracle import checker
from internvl_edge.errors import UsageError, VerificationError
from internvl_edge.export.compare import (
    FLOOR_DB,
    Agreement,
    CostBounds,
    agreement,
    agrees,
    require_cost,
)
from internvl_edge.export.config.checkpoint import InternVLConfig
from internvl_edge.quantize.graph import qdq
from internvl_edge.quantize.numerics import formats

pytestmark = pytest.mark.slow

PRECISIONS = ("fp16", "bf16", "int8", "fp8", "int8-wo", "int4-wo")
QUANTIZED = PRECISIONS[2:]
COMPONENTS = ("vision", "image_embed", "text_embed", "matcher")
GRAPHS = "internvl_edge.compiler.steps.graphs"


# --- unseen checkpoints --------------------------------------------------------------------------


def shapes(seed: int) -> InternVLConfig:
    """Shapes that nothing was tuned on."""
    draw = random.Random(seed)
    heads, head = draw.choice([2, 3, 4]), draw.choice([16, 20, 24, 32])
    language, size = draw.choice([2, 3, 4]), draw.choice([8, 16, 32])
    return replace(
        TINY,
        vision=replace(
            TINY.vision,
            hidden_size=heads * head,
            num_attention_heads=heads,
            intermediate_size=draw.choice([2, 4]) * heads * head,
            num_hidden_layers=draw.choice([1, 2, 3, 5]),
            image_size=draw.choice([28, 42]),
        ),
        qllama=replace(
            TINY.qllama,
            hidden_size=language * size,
            num_attention_heads=language,
            intermediate_size=draw.choice([2, 3]) * language * size,
            num_hidden_layers=draw.choice([1, 2, 4]),
        ),
        attn_pool_num_heads=heads,
        cross_attention_frequency=draw.choice([1, 2]),
        num_query_token=draw.choice([3, 8]),
    )


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("seed", range(100, 102))  # 108 held too: 48 exports, 16 CPU-minutes
def test_unseen_checkpoints_publish(
    seed: int, precision: str, pictures: Path, tmp_path: Path
) -> None:
    written = write_internvl(tmp_path / "checkpoint", shapes(seed), seed=seed)
    options = ExportOptions(
        checkpoint=written.path,
        out=tmp_path / "out",
        precision=precision,
        components=COMPONENTS,
        calibration=pictures if precision in QUANTIZED else None,
    )
    manifest = compiler.export(options).manifest
    for name, record in manifest.components.items():
        assert record.verification is not None
        assert np.isfinite(record.verification["sqnr_db"]), name


# --- what is held exactly ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vit(tmp_path_factory: Any) -> Written:
    return write_vit(tmp_path_factory.mktemp("verdict") / "checkpoint", seed=3)


def exported(vit: Written, pictures: Path, out: Path, precision: str, **more: Any) -> Artifact:
    calibration = pictures if precision in QUANTIZED else None
    return compiler.export(
        ExportOptions(
            checkpoint=vit.path, out=out, precision=precision, calibration=calibration, **more
        )
    )


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8", "fp8"])
def test_drift_is_no_fault(
    vit: Written,
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    precision: str,
) -> None:
    """Where graph and simulation are far apart, both without roundings are equal."""
    monkeypatch.setattr(checker, "agrees", lambda figures, bound: False)
    assert exported(vit, pictures, tmp_path / "out", precision).manifest.precision == precision


def halved_values(monkeypatch: pytest.MonkeyPatch) -> None:
    original = formats.quantize

    def halved(x: Any, scale: Any, fmt: Any, axis: Any = None) -> Any:
        return original(x, 2 * np.asarray(scale), fmt, axis)

    monkeypatch.setattr(formats, "quantize", halved)


def wrong_epsilon(monkeypatch: pytest.MonkeyPatch) -> None:
    """A float operator next to the products, at every norm."""
    original = qdq.insert_qdq

    def wrong(model: ir.Model, linears: Any) -> int:
        for node in model.graph:
            if "epsilon" in node.attributes:
                node.attributes["epsilon"] = ir.AttrFloat32("epsilon", 0.1)
        return original(model, linears)

    monkeypatch.setattr(f"{GRAPHS}.insert_qdq", wrong)


@pytest.mark.parametrize("mutate", [halved_values, wrong_epsilon])
@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_faults_are_told_from_drift(
    vit: Written,
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    mutate: Callable[[pytest.MonkeyPatch], None],
    precision: str,
) -> None:
    mutate(monkeypatch)
    with pytest.raises(VerificationError, match="the graph is not the model"):
        exported(vit, pictures, tmp_path / "out", precision)
    assert not (tmp_path / "out").exists()


def edited(edit: Callable[[ir.Model], None], monkeypatch: pytest.MonkeyPatch) -> None:
    original = qdq.insert_qdq

    def changed(model: ir.Model, linears: Any) -> int:
        count = original(model, linears)
        edit(model)
        return count

    monkeypatch.setattr(f"{GRAPHS}.insert_qdq", changed)


def of_type(model: ir.Model, op: str) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type == op]


def shifted(model: ir.Model) -> None:
    """A zero point of one on a pair."""
    zero = of_type(model, "QuantizeLinear")[0].inputs[2]
    assert zero is not None and zero.dtype is not None
    zero.const_value = ir.tensor(np.array(1, zero.dtype.numpy()), name=zero.name)


def unsigned(model: ir.Model) -> None:
    """A pair that clips what is negative."""
    zero = of_type(model, "QuantizeLinear")[0].inputs[2]
    assert zero is not None
    zero.const_value = ir.tensor(np.array(0, np.uint8), name=zero.name)
    zero.type = ir.TensorType(ir.DataType.UINT8)


def stray(model: ir.Model) -> None:
    """A pair where the recipe has none: before a norm."""
    pair = of_type(model, "QuantizeLinear")[0]
    norm = of_type(model, "RMSNormalization")[-1]
    added = ir.node("QuantizeLinear", [norm.inputs[0], *pair.inputs[1:]], name="stray")
    back = ir.node("DequantizeLinear", [added.outputs[0], *pair.inputs[1:]])
    back.outputs[0].type = norm.inputs[0].type  # type: ignore[union-attr]
    model.graph.insert_before(norm, [added, back])
    norm.replace_input_with(0, back.outputs[0])


def two_scales(model: ir.Model) -> None:
    """Dequantized with another scale than quantized."""
    quantize = of_type(model, "QuantizeLinear")[0]
    dequantize = next(iter(quantize.outputs[0].uses())).node
    other = of_type(model, "QuantizeLinear")[-1].inputs[1]
    dequantize.replace_input_with(1, other)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (shifted, "expected one product"),
        (unsigned, "expected one product"),
        (stray, "stray: expected no pair but those of calibrated products"),
        (two_scales, "expected one product"),
    ],
)
def test_pairs_are_held_one_by_one(
    vit: Written,
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    edit: Callable[[ir.Model], None],
    message: str,
) -> None:
    edited(edit, monkeypatch)
    with pytest.raises(VerificationError, match=message):
        exported(vit, pictures, tmp_path / "out", "int8")


# --- what it costs -------------------------------------------------------------------------------


def figure(sqnr_db: float, cosine: float = 1.0, width: int = 8) -> dict[str, Agreement]:
    return {
        "y": Agreement(cosine=cosine, sqnr_db=sqnr_db, max_abs=0.1, is_narrow=width < 4),
    }


@pytest.mark.parametrize(
    ("figures", "bounds", "message"),
    [
        (figure(19.0), CostBounds(min_sqnr_db=19.5), r"at least 19\.5 dB \(--min-sqnr\), found"),
        (figure(30, 0.97), CostBounds(max_drop=0.02), r"at most 0\.02 \(--max-drop\), found 0\.03"),
        (figure(9.9), CostBounds(), "at least 10 dB, below which the output is of no use"),
        (figure(-np.inf), CostBounds(), "expected numbers, found NaN or infinity"),
        (figure(-np.inf, width=2), CostBounds(), "expected numbers, found NaN or infinity"),
        (figure(19.0, width=2), CostBounds(min_sqnr_db=19.5), r"--min-sqnr"),
    ],
)
def test_costs_that_are_refused(
    figures: dict[str, Agreement], bounds: CostBounds, message: str
) -> None:
    with pytest.raises(VerificationError, match=message) as caught:
        require_cost(figures, "matcher", bounds, FLOOR_DB, "try bf16")
    assert str(caught.value).startswith("matcher, output 'y': ")
    assert str(caught.value).endswith("; try bf16")


@pytest.mark.parametrize(
    ("figures", "bounds"),
    [
        (figure(19.0), CostBounds()),
        (figure(10.0, -1.0), CostBounds()),
        (figure(3.0, width=2), CostBounds()),  # eight logits are no statistics
        (figure(19.5, 0.98), CostBounds(min_sqnr_db=19.5, max_drop=0.021)),
    ],
)
def test_costs_that_are_said(figures: dict[str, Agreement], bounds: CostBounds) -> None:
    require_cost(figures, "matcher", bounds, FLOOR_DB, "")


def test_an_agreement_knows_how_much_it_saw() -> None:
    x = np.arange(1, 13, dtype=np.float32)
    assert agreement(x.reshape(6, 2), x.reshape(6, 2)).is_narrow
    wide = agreement(x.reshape(2, 6), x.reshape(2, 6))
    assert not wide.is_narrow
    assert agrees({"y": wide}, "fp32")
    nothing = agreement(x.reshape(6, 2), np.full((6, 2), np.nan, np.float32))
    assert nothing.is_narrow and not agrees({"y": nothing}, "bf16")


# --- the user's bounds ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bounded(vit: Written, pictures: Path, tmp_path_factory: Any) -> Artifact:
    out = tmp_path_factory.mktemp("bounded") / "out"
    return exported(vit, pictures, out, "int8", min_sqnr=20.0, max_drop=0.05)


def test_a_manifest_says_what_it_cost(bounded: Artifact) -> None:
    found = bounded.manifest.components["vision"].verification
    assert found is not None
    assert found["bounds"] == {"min_sqnr_db": 20.0, "max_drop": 0.05}
    assert found["inputs"] == "calibration"
    assert len(found["costly_layers"]) == 3
    first, second, _ = found["costly_layers"]
    assert first["layer"].startswith("vision_model.encoder.layers.")
    assert min(first["input_sqnr_db"], first["weight_sqnr_db"]) < second["input_sqnr_db"] + 3


def test_an_export_beyond_its_bound(vit: Written, pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(VerificationError, match=r"--min-sqnr.*most is lost in .*layers\.\d.*try"):
        exported(vit, pictures, tmp_path / "out", "int8", min_sqnr=90.0)
    assert not (tmp_path / "out").exists()


def test_bounds_are_repeated_on_the_same_samples(
    vit: Written, bounded: Artifact, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = bounded.manifest.components["vision"].verification
    assert recorded is not None
    again = compiler.verify(bounded.path, vit.path, calibration=pictures)["vision"]
    assert again["inputs"] == "calibration"
    assert again["sqnr_db"] == pytest.approx(recorded["sqnr_db"], abs=0.5)
    assert again["bounds"] == recorded["bounds"]
    with pytest.raises(VerificationError, match="--min-sqnr"):
        compiler.verify(bounded.path, vit.path, calibration=pictures, min_sqnr=90.0)
    on_noise = compiler.verify(bounded.path, vit.path)["vision"]
    assert on_noise["inputs"] == "noise"
    assert "bounds" not in on_noise, "they were set on other inputs"
    with pytest.raises(VerificationError, match="--max-drop"):
        compiler.verify(bounded.path, vit.path, max_drop=0.0)
    seen: list[CostBounds] = []
    original = checker.require_cost

    def seeing(*given: Any) -> None:
        seen.append(given[2])
        original(*given)

    monkeypatch.setattr(checker, "require_cost", seeing)
    compiler.verify(bounded.path, vit.path, calibration=pictures)
    assert set(seen) == {CostBounds(min_sqnr_db=20.0, max_drop=0.05)}


def test_other_images_than_it_was_calibrated_on(
    vit: Written, bounded: Artifact, tmp_path: Path
) -> None:
    for i in range(4):
        level = np.full((40, 50, 3), 60 * i, np.uint8)
        Image.fromarray(level).save(tmp_path / f"{i}.png")
    with pytest.raises(UsageError, match=r"expected the images that .* was calibrated on"):
        compiler.verify(bounded.path, vit.path, calibration=tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"verify": "none", "min_sqnr": 20.0}, "leave --verify none out"),
        ({"verify": "none", "max_drop": 0.1}, "leave --verify none out"),
        ({"min_sqnr": -1.0}, "expected a number of dB from 0 up"),
        ({"min_sqnr": float("nan")}, "expected a number of dB from 0 up"),
        ({"max_drop": 1.5}, "expected a number from 0 to 1"),
    ],
)
def test_bounds_that_cannot_be(
    vit: Written, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        compiler.forecast(ExportOptions(checkpoint=vit.path, out=tmp_path / "out", **changes))


def test_bounds_need_the_whole_model(
    vit: Written, bounded: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("internvl_edge.compiler.steps.verify.MAX_WHOLE_NBYTES", 0)
    options = ExportOptions(checkpoint=vit.path, out=tmp_path / "out", min_sqnr=20.0)
    with pytest.raises(UsageError, match="add --verify full"):
        compiler.forecast(options)
    compiler.forecast(replace(options, verify="full"))
    with pytest.raises(UsageError, match="one block at a time"):
        compiler.verify(bounded.path, vit.path, min_sqnr=20.0)
    assert "bounds" not in compiler.verify(bounded.path, vit.path)["vision"]


# --- the words -----------------------------------------------------------------------------------


def test_the_commands_say_what_it_costs(
    vit: Written, bounded: Artifact, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["inspect", str(bounded.path)]) == 0
    shown = capsys.readouterr().out
    assert "SQNR is what int8 costs compared with PyTorch in float32, on 4 samples" in shown
    assert "lowest: vision, " in shown and "most is lost in vision_model." in shown
    assert "--precision auto" in shown
    assert "--min-sqnr 20 is kept by every component" in shown
    compared = ["verify", str(bounded.path), "--checkpoint", str(vit.path)]
    assert run(compared) == 0
    shown = capsys.readouterr().out
    assert "on noise" in shown and "--min-sqnr" not in shown
    assert run([*compared, "--calib", str(pictures)]) == 0
    assert "--max-drop 0.05 is kept" in capsys.readouterr().out
    assert run([*compared, "--calib", str(pictures), "--min-sqnr", "95"]) == 6
    assert "expected at least 95 dB (--min-sqnr)" in capsys.readouterr().err
    assert run(["verify", str(bounded.path), "--min-sqnr", "95"]) == 2
    assert "add --checkpoint" in capsys.readouterr().err

"""The report: what it shows, that it is escaped, self-contained and the same every time."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from support.checkpoints import write_internvl
from support.reports import HOSTILE, manifest, parsed

from internvl_edge.artifact.open import open_artifact
from internvl_edge.compiler import ExportOptions, export
from internvl_edge.compiler.report.report import REPORT_FILE, AccuracyFigures, render, report_with
from internvl_edge.errors import ArtifactError
from internvl_edge.quantize.calibration.ranges import HEADROOM
from internvl_edge.quantize.numerics import formats
from internvl_edge.quantize.numerics.observers import RangeObserver
from internvl_edge.quantize.numerics.statistics import (
    BEST_DB,
    LayerStatistics,
    decibels,
    input_sqnr_db,
    layers_to_json,
    read_statistics,
    weight_squares,
    write_statistics,
)


def layer(block: int, kind: str, stream: str = "image", **changed: Any) -> LayerStatistics:
    figures = {"absmax": 9.0, "clip": 7.0, "scale": 7 / 127, "input_sqnr_db": 34.0}
    figures |= {"weight_sqnr_db": 42.0}
    weight = f"vision_model.encoder.layers.{block}.{kind}.weight"
    return LayerStatistics(stream=stream, weight=weight, **figures | changed)


LAYERS = [layer(b, k) for b in range(3) for k in ("mlp.fc2", "attn.qkv")]
LAYERS[2] = layer(1, "mlp.fc2", input_sqnr_db=3.0, absmax=5000.0)


# --- figures -------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", ["int8", "fp8"])
def test_the_sqnr_of_an_input_is_that_of_rounding_it(fmt: str) -> None:
    x = np.random.default_rng(0).standard_normal((400, 256)).astype(np.float32)
    observer = RangeObserver()
    observer.update(x)
    scale = observer.scale("mse", fmt)  # type: ignore[arg-type]
    exact = formats.sqnr_db(x, formats.fake_quantize(x, scale, fmt))
    assert input_sqnr_db(observer, scale, fmt) == pytest.approx(exact, abs=0.1)


@pytest.mark.parametrize("fmt", ["int8", "fp8"])
def test_the_sqnr_of_a_weight_is_that_of_rounding_it(fmt: str) -> None:
    weight = np.random.default_rng(0).standard_normal((700, 96)).astype(np.float32)
    scales = formats.weight_scale(weight, fmt, axis=0)
    values = formats.quantize(weight, scales, fmt, axis=0)
    exact = formats.sqnr_db(weight, formats.dequantize(values, scales, axis=0))
    assert decibels(*weight_squares(weight, values, scales)) == pytest.approx(exact, abs=1e-4)
    zeros = np.zeros_like(weight), np.zeros_like(values)
    assert decibels(*weight_squares(*zeros, scales)) == BEST_DB


def test_statistics_round_trip(tmp_path: Path) -> None:
    assert read_statistics(tmp_path) == ()
    write_statistics(tmp_path, layers_to_json(LAYERS))
    assert read_statistics(tmp_path) == tuple(LAYERS)
    (tmp_path / "statistics.json").write_text('{"layers": [{}]}')
    with pytest.raises(ArtifactError, match="expected figures of linear layers"):
        read_statistics(tmp_path)


# --- the page ------------------------------------------------------------------------------------


def test_what_it_shows() -> None:
    page = parsed(render(manifest(precision="int8", recipe={"smooth": 0.5}), LAYERS))
    row = " ".join(page.text.split())
    assert "0.99876031.40.25PyTorch float32, 4 samples, blocks 0, 2" in row
    for words in ("tiny at int8", "Vision tower", "mlp.fc2", "smooth", "0.5", "weights.bin"):
        assert words in page.text
    titles = page.text
    assert "block 1, mlp.fc2: 3.0 dB" in titles
    assert "block 1: largest 5000, range to 7" in titles
    rects = [attributes for tag, attributes in page.tags if tag == "rect"]
    assert len(rects) == 2 * len(LAYERS)  # inputs and weights
    assert [r["class"] for r in rects].count("s0") == 1  # one of 3 dB


def test_nothing_but_itself() -> None:
    """No scripts, and nothing that a browser would fetch."""
    text = render(manifest(), LAYERS)
    page = parsed(text)
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "link", "img", "iframe", "object", "embed", "use", "image"}
    assert not any(k in ("src", "href") or k.startswith("on") for _, a in page.tags for k in a)
    assert not re.search(r"url\(|@import|http", text.replace("http-equiv", ""))


def test_everything_is_escaped() -> None:
    hostile = manifest(
        source={
            "checkpoint": HOSTILE,
            "files": {},
            "calibration": {"name": HOSTILE, "samples": 1, "sha256": "0", "skipped": [HOSTILE]},
        },
        recipe={"name": HOSTILE, "exclude": [HOSTILE], HOSTILE: 1},
        precision=HOSTILE,
    )
    vision = replace(hostile.components["vision"], verification={"skipped": HOSTILE})
    hostile = replace(hostile, components={HOSTILE: vision})
    layers = [layer(0, HOSTILE), layer(1, f'"{HOSTILE}')]
    text = render(hostile, layers)
    assert HOSTILE not in text
    assert not {"script", "alert"} & {tag for tag, _ in parsed(text).tags}
    assert parsed(text).text.count(HOSTILE) > 10


@pytest.mark.parametrize("layers", [[], LAYERS, [layer(5, "mlp.fc1")], [layer(0, "x", absmax=0.0)]])
def test_every_drawing_is_sound(layers: list[LayerStatistics]) -> None:
    text = render(manifest(), layers)
    drawings = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert bool(drawings) == bool(layers)
    for drawing in drawings:
        svg = ElementTree.fromstring(drawing)
        width, height = float(svg.get("width", 0)), float(svg.get("height", 0))
        for shape in svg.iter():
            for x in ("x", "cx", "x1", "x2"):
                assert 0 <= float(shape.get(x, 0)) <= width
            for y in ("y", "cy", "y1", "y2"):
                assert 0 <= float(shape.get(y, 0)) <= height


@pytest.mark.slow
def test_an_export_has_one_and_lists_it(tmp_path: Path) -> None:
    """Twice the same bytes; every quantized layer of every stream, and none where nothing is."""
    checkpoint = write_internvl(tmp_path / "checkpoint").path
    pages = []
    for i, precision in enumerate(("int8", "int8", "fp16")):
        out = tmp_path / str(i)
        options = ExportOptions(
            checkpoint=checkpoint,
            out=out,
            precision=precision,
            components=("vision", "text_embed"),
            verify="none",
        )
        export(options)
        assert REPORT_FILE in open_artifact(out).manifest.files
        pages.append((out / REPORT_FILE).read_bytes())
    assert pages[0] == pages[1]
    assert b"not verified: --verify none" in pages[0]
    found = read_statistics(tmp_path / "0")
    assert {entry.stream for entry in found} == {"image", "text"}
    assert sum(entry.stream == "image" for entry in found) == 2 * 4
    for entry in found:
        assert 0 < entry.clip <= entry.absmax * HEADROOM * 1.004  # as bfloat16 holds the scale
        # after GELU the middle of the range is not zero
        shift = entry.clip - entry.scale * 127
        assert shift == pytest.approx(0.0, abs=1e-5) or (
            "fc2" in entry.weight and 0 < shift < entry.clip
        )
        assert 10 < entry.input_sqnr_db < 60
        assert 30 < entry.weight_sqnr_db < 60
    assert read_statistics(tmp_path / "2") == ()
    assert "Vision tower" in pages[0].decode()
    assert "Vision tower" not in pages[2].decode()


def test_accuracy_at_every_precision_is_shown(tmp_path: Path) -> None:
    found = manifest(precision="int8")
    accuracy = AccuracyFigures(
        on="3 <scenes>",
        precisions=("fp32", "int8"),
        tasks=(("captions & more", (0.95, 0.125)),),
    )
    page = report_with(tmp_path, found, accuracy=accuracy)
    assert "on 3 &lt;scenes&gt;." in page
    assert "<u>int8</u>" in page
    assert "<u>fp32</u>" not in page
    assert re.search(r"captions &amp; more</td>.*95\.0 %.*12\.5 %", page)
    assert 'width="57.0"' in page
    assert "<h2>Accuracy</h2>" in page
    assert "<h2>Accuracy</h2>" not in report_with(tmp_path, found)

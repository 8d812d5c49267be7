"""8-bit levels: decoded side by side, normalised in the graph or before it, to the same bits."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image
from support.checkpoints import write_internvl

from internvl_edge import load
from internvl_edge.artifact.open import Artifact, open_artifact
from internvl_edge.compiler import ExportOptions, build, export, verify
from internvl_edge.compiler.oracle.bisect import bisect
from internvl_edge.compiler.steps import trace
from internvl_edge.errors import MediaError, UsageError, VerificationError
from internvl_edge.export.graph.uint8_input import on_levels, take_levels
from internvl_edge.runtime.images.transform import (
    Preprocessing,
    nearest_levels,
    normalised,
    pixel_levels,
    pixel_values,
)
from internvl_edge.types import Array

PREPROCESSING = Preprocessing(size=12)
LEVELS = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 256, 3).transpose(2, 0, 1)[None]


def pictures(count: int) -> list[Array]:
    rng = np.random.default_rng(3)
    return [rng.integers(0, 256, (20 + i, 31, 3), np.uint8) for i in range(count)]


def png(array: Array) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, "png")
    return file.getvalue()


# --- on the host ---------------------------------------------------------------------------------


def test_pictures_side_by_side_are_those_one_by_one() -> None:
    sources = [png(picture) for picture in pictures(40)]
    together = pixel_levels(sources, PREPROCESSING)
    for i, source in enumerate(sources):
        np.testing.assert_array_equal(together[i : i + 1], pixel_levels(source, PREPROCESSING))
    assert together.dtype == np.uint8
    np.testing.assert_array_equal(
        pixel_values(sources, PREPROCESSING), normalised(together, PREPROCESSING)
    )


def test_the_first_bad_picture_is_named() -> None:
    sources = [png(picture) for picture in pictures(20)]
    sources[7] = sources[13] = b"no picture"
    with pytest.raises(MediaError, match="image 8 of 20"):
        pixel_levels(sources, PREPROCESSING)


def test_every_level_comes_back() -> None:
    pixels = normalised(LEVELS, PREPROCESSING)
    assert pixels.dtype == np.float32
    np.testing.assert_array_equal(nearest_levels(pixels, PREPROCESSING), LEVELS)
    np.testing.assert_array_equal(
        on_levels({"pixel_values": pixels}, PREPROCESSING)["pixel_values"], pixels
    )


def test_noise_becomes_what_levels_can_express() -> None:
    noise = np.random.default_rng(0).standard_normal((2, 3, 4, 4)).astype(np.float32) * 9
    snapped = on_levels({"pixel_values": noise}, PREPROCESSING)["pixel_values"]
    assert snapped.min() >= normalised(LEVELS[..., :1], PREPROCESSING).min()
    assert not np.array_equal(snapped, noise)
    assert on_levels({"pixel_values": noise}, None)["pixel_values"] is noise
    assert "pixel_values" not in on_levels({"ids": noise}, PREPROCESSING)


# --- in the graph --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``fp32``, ``uint8`` and ``int8`` (of levels too), of one checkpoint."""
    root = tmp_path_factory.mktemp("pixels")
    checkpoint = write_internvl(root / "checkpoint").path
    photographs = root / "photographs"
    photographs.mkdir()
    for i, picture in enumerate(pictures(4)):
        Image.fromarray(picture).save(photographs / f"{i}.png")
    common = {"checkpoint": checkpoint, "components": ("vision", "image_embed")}
    export(ExportOptions(out=root / "fp32", verify="none", **common))  # type: ignore[arg-type]
    export(ExportOptions(out=root / "uint8", input="uint8", **common))  # type: ignore[arg-type]
    export(
        ExportOptions(
            out=root / "int8",
            precision="int8",
            input="uint8",
            calibration=photographs,
            **common,  # type: ignore[arg-type]
        )
    )
    return root


def opened(place: Path, name: str) -> Artifact:
    return open_artifact(place / name)


def test_the_manifest_says_so(place: Path) -> None:
    for name in ("uint8", "int8"):
        for record in opened(place, name).manifest.components.values():
            (spec,) = record.inputs
            assert spec.name == "pixel_values"
            assert spec.dtype == "uint8"
            assert spec.shape[:2] == ("batch", 3)
    figures = opened(place, "uint8").manifest.components["vision"].verification
    assert figures is not None
    assert figures["sqnr_db"] > 100
    onnx.checker.check_model(str(opened(place, "uint8").onnx_path("vision")), full_check=True)


def test_both_ways_give_the_same_bits(place: Path) -> None:
    given = [png(picture) for picture in pictures(5)]
    with load(place / "fp32") as outside, load(place / "uint8") as inside:
        np.testing.assert_array_equal(outside.encode_image(given), inside.encode_image(given))


def test_normalised_arrays_are_refused(place: Path) -> None:
    size = opened(place, "uint8").manifest.image_size
    with (
        load(place / "uint8") as model,
        pytest.raises(UsageError, match=r"normalises inside its graphs.*found an array float32"),
    ):
        model.encode_image(np.zeros((1, 3, size, size), np.float32))


def test_verify_and_bisect_know_levels(place: Path) -> None:
    figures = verify(place / "uint8", place / "checkpoint")
    assert figures["image_embed"]["sqnr_db"] > 100
    (reading,) = bisect(place / "uint8", place / "checkpoint", "vision")
    assert reading.first_bad is None


def test_wrong_constants_are_caught(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A standard deviation that is 1 % off."""
    std = (0.2313, 0.224, 0.225)
    monkeypatch.setattr(
        trace, "take_levels", lambda model, right: take_levels(model, replace(right, std=std))
    )
    with pytest.raises(VerificationError, match="vision"):
        export(
            ExportOptions(
                checkpoint=place / "checkpoint",
                out=tmp_path / "out",
                input="uint8",
                components=("vision",),
            )
        )


@pytest.mark.slow
@pytest.mark.rtx
def test_the_engine_takes_levels(place: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    build(place / "int8", ("tensorrt-rtx",), components=("vision",))
    (record,) = opened(place, "int8").manifest.engines
    assert (place / "int8" / record.file).stat().st_size > 0

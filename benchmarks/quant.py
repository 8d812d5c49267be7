"""The worth of each step of a quantization recipe, on checkpoints with and without outliers.

    python benchmarks/quant.py [--layers 4] [--seeds 0 1] [--peers] [--json FILE]

Recipes are compared on towers of InternViT-6B's or -300M's widths with made-up weights
(``synthetic``): plain;
with function-preserving outlier channels; with massive activations and outliers between v and its
projection as well; and with outlier channels after GELU on top. Each is calibrated on a few
photographs; what it computes is simulated in PyTorch (``oracle.simulate``, which every export
is held against) on photographs it has not seen, and ``last_hidden_state`` is compared with float32.
Massive activations carry nearly all of the signal's energy, so figures leave out the few channels
and tokens that hold them (``ordinary``).

``--peers`` lets ONNX Runtime and ModelOpt quantize PyTorch's own graph of the same towers, on the
same photographs, to INT8.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from internvl_edge.artifact.components import COMPONENTS, VISION
from internvl_edge.artifact.workspace import Workspace
from internvl_edge.compiler.oracle.simulate import Quantization
from internvl_edge.export.checkpoint.checkpoint import Checkpoint, open_checkpoint
from internvl_edge.export.checkpoint.load import load_model
from internvl_edge.export.components import build_component
from internvl_edge.export.config.checkpoint import CheckpointConfig
from internvl_edge.export.synthetic import PRESETS, Synthesis, write_checkpoint
from internvl_edge.export.towers.streams import Samples, calibration_blocks
from internvl_edge.files.spool import Budget
from internvl_edge.quantize.calibration.block import calibrate_block
from internvl_edge.quantize.calibration.images import sample_set
from internvl_edge.quantize.fold import source_of
from internvl_edge.quantize.numerics.formats import sqnr_db
from internvl_edge.quantize.recipe import Recipe, recipe_for
from internvl_edge.runtime.images.transform import Preprocessing, pixel_values
from internvl_edge.types import Array

CHECKPOINTS = {
    "plain": {},
    "outliers": {"outliers": True},
    "massive": {"outliers": True, "massive": True},
    "gelu": {"outliers": True, "massive": True, "gelu": True},
}
TOWERS = {"6b": "internvit-6b-224", "300m": "internvl3-1b"}
INT8, FP8 = recipe_for("int8"), recipe_for("fp8")
_NAIVE = Recipe(name="naive, max", range_method="max")
_FOLDED = replace(_NAIVE, name="+ gains and LayerScale folded, mse", range_method="mse", fold=True)
_ROTATED = replace(_FOLDED, name="+ rotations", rotate=True)
_SMOOTHED = replace(_ROTATED, name="+ smoothing, alpha searched", smooth="auto")
_SHIFTED = replace(_SMOOTHED, name="+ shift after GELU", shift=True)
_CHOSEN = replace(_SHIFTED, name="+ ranges with headroom, or by output error", range_method="auto")
_SPREAD = replace(_CHOSEN, name="+ factors after GELU", spread=True)
RECIPES = (
    _NAIVE,
    replace(_NAIVE, name="SmoothQuant 0.5, mse", range_method="mse", smooth=0.5),
    _FOLDED,
    _ROTATED,
    _SMOOTHED,
    _SHIFTED,
    _CHOSEN,
    _SPREAD,
    replace(INT8, name="int8 (+ bias correction)"),
    replace(FP8, name="fp8"),
    replace(INT8, name="int8, gptq", rounding="gptq"),
    replace(FP8, name="fp8, gptq", rounding="gptq"),
    replace(FP8, name="fp8, rotated", rotate=True),
    replace(FP8, name="fp8, attention too", attention="fp8"),
)
MASSIVE = 50.0  # times the median magnitude: not counted as ordinary
CALIBRATION_IMAGES, HELD_OUT = 8, 4
PEERS = {  # functions of ``peers``; ModelOpt needs an environment of its own
    "ONNX Runtime, MinMax": "ort_quantize_static",
    "ONNX Runtime, percentile": "ort_percentile",
    "ModelOpt": "modelopt_quantize",
}


def main() -> None:
    """Run the command line of this module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument(
        "--tower", choices=TOWERS, default="6b", help="6b: RMSNorm and QK norm; 300m: LayerNorm"
    )
    parser.add_argument(
        "--width", type=int, help="channels, the tower's own by default; heads are 64 or 128 wide"
    )
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--layer-scale", type=float, default=1.0, help="mean of made-up LayerScale")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--checkpoints", nargs="+", choices=CHECKPOINTS, default=[*CHECKPOINTS])
    parser.add_argument("--recipes", nargs="+", help="names; all by default")
    parser.add_argument("--peers", action="store_true")
    parser.add_argument(
        "--modelopt-python", help='Python of an environment with "nvidia-modelopt[onnx]"'
    )
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    recipes = [r for r in RECIPES if chosen.recipes is None or r.name in chosen.recipes]
    rows = []
    for seed in chosen.seeds:
        for kind in chosen.checkpoints:
            python = (chosen.modelopt_python or "") if chosen.peers else None
            made = synthesis(kind, seed, chosen)
            for row in measure(kind, made, recipes, python):
                rows.append(row)
                sys.stdout.write(json.dumps(row) + "\n")
                sys.stdout.flush()
    if chosen.json is not None:
        command = shlex.join(["python", *sys.argv]).replace(str(chosen.modelopt_python), "PYTHON")
        report = {"command": command, "rows": rows}
        chosen.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def synthesis(kind: str, seed: int, chosen: argparse.Namespace) -> Synthesis:
    """Make a tower of the depth, width and image size asked for."""
    vision = replace(
        PRESETS[TOWERS[chosen.tower]].vision,
        num_hidden_layers=chosen.layers,
        image_size=chosen.image_size,
    )
    if chosen.width is not None:
        vision = replace(
            vision,
            hidden_size=chosen.width,
            intermediate_size=4 * chosen.width,
            num_attention_heads=chosen.width // (128 if chosen.width % 128 == 0 else 64),
        )
    return Synthesis(
        config=CheckpointConfig(kind="vit", vision=vision),
        seed=seed,
        layer_scale=chosen.layer_scale,
        **CHECKPOINTS[kind],
    )


def measure(
    kind: str, made: Synthesis, recipes: list[Recipe], modelopt_python: str | None = None
) -> Iterator[dict[str, Any]]:
    """Measure a row per recipe on one checkpoint; per peer too, if ``modelopt_python`` is given."""
    seed = made.seed
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint"
        write_checkpoint(made, path)
        checkpoint = open_checkpoint(path)
        pixels = _photographs(made.config.vision.image_size, seed)
        seen, held_out = pixels[:CALIBRATION_IMAGES], pixels[CALIBRATION_IMAGES:]
        with torch.inference_mode():
            reference = load_model(checkpoint)(held_out).numpy()

        def row(name: str, quantized: Callable[[], Array]) -> dict[str, Any]:
            started = time.perf_counter()
            try:
                row: dict[str, Any] = dict(figures(reference, quantized()))
            except subprocess.CalledProcessError as error:  # a peer's process; it said why
                row = {"error": f"exit status {error.returncode}"}
            seconds = round(time.perf_counter() - started, 1)
            return {"checkpoint": kind, "seed": seed, "recipe": name, **row, "seconds": seconds}

        for recipe in recipes:
            yield row(recipe.name, lambda r=recipe: quantized_output(checkpoint, r, seen, held_out))
        if modelopt_python is None:
            return
        np.save(path.parent / "images.npy", seen.numpy())
        np.save(path.parent / "held-out.npy", held_out.numpy())
        _run_peer("torch_export", sys.executable, path.parent)
        for name, function in PEERS.items():
            python = modelopt_python if name == "ModelOpt" else sys.executable
            if python:
                yield row(name, lambda f=function, p=python: peer_output(f, p, path.parent))


def quantized_output(
    checkpoint: Checkpoint, recipe: Recipe, seen: torch.Tensor, held_out: torch.Tensor
) -> Array:
    """Calibrate a tower on some images and simulate it on others."""
    source = source_of(checkpoint, recipe)
    scales: dict[str, float] = {}
    stored: dict[str, Array] = {}
    held: dict[str, Array] = {}  # weights of recipes with GPTQ
    samples = Samples(pixel_values=[seen])
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        work = Workspace(Path(folder), Budget(2 << 30))
        for block, streams in calibration_blocks(source, samples, {"image"}, work):
            done = calibrate_block(block, streams, recipe, work.hidden, work.scratch)
            work.finish(block.name, {}, {"image": streams["image"].hidden})
            scales |= done.activations["image"]
            stored |= done.folded
            held |= {name: weight.values for name, weight in done.weights.items()}
        work.close()
        model = build_component(COMPONENTS[VISION], load_model(source))
        quantization = Quantization(
            recipe=recipe,
            scales={"image": scales},
            stored=stored,
            source=source,
            held=held.__getitem__,
        )
        with quantization.applied_to(model, "image"):
            output: Array = model(held_out).numpy()
    return output


def peer_output(function: str, python: str, work: Path) -> Array:
    """Run a peer's INT8 graph of ``work/checkpoint`` on the held-out images."""
    try:
        _run_peer(function, python, work)
        _run_peer("outputs", sys.executable, work)
        output: Array = np.load(work / "outputs.npy")
    finally:
        for file in work.glob("peer.onnx*"):
            file.unlink()
    return output


def _run_peer(function: str, python: str, work: Path) -> None:
    """Run a function of ``peers`` as a process of its own: its memory goes with it."""
    call = f"import peers; peers.{function}({str(work)!r})"
    subprocess.run([python, "-c", call], cwd=Path(__file__).parent, check=True)


def figures(reference: Array, output: Array) -> dict[str, float]:
    """Compute the SQNR of all and of ordinary values, the worst cosine of an image and a token."""
    magnitude = np.abs(reference)
    ordinary = magnitude < MASSIVE * np.median(magnitude)
    return {
        "sqnr_db": round(sqnr_db(reference, output), 2),
        "ordinary_db": round(sqnr_db(reference * ordinary, output * ordinary), 2),
        "cosine": round(_worst_cosine(reference, output, lambda x: x.reshape(len(x), -1)), 6),
        "token_cosine": round(
            _worst_cosine(reference, output, lambda x: x.reshape(-1, x.shape[-1])), 6
        ),
    }


def _worst_cosine(a: Array, b: Array, rows: Callable[[Array], Array]) -> float:
    x, y = (rows(v.astype(np.float64)) for v in (a, b))
    norms = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    return float(((x * y).sum(axis=1) / norms).min())


def _photographs(size: int, seed: int) -> torch.Tensor:
    images = sample_set("photographs", CALIBRATION_IMAGES + HELD_OUT, seed)
    preprocessing = Preprocessing(size=size)
    each = [pixel_values(images.image(i), preprocessing) for i in range(len(images))]
    return torch.from_numpy(np.concatenate(each))


if __name__ == "__main__":
    main()

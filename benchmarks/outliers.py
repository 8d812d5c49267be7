"""The trained demo with outlier channels: what each precision keeps of its accuracy.

    python benchmarks/outliers.py             # two seeds of outliers, and none

Six channels of every norm become 64 times larger and the columns that read them 64 times smaller,
which changes no float32 output; ``plain`` is what INT8 was before rotation and folding. Prints a
table and writes ``results/outliers.json``. Target: int8 within 0.3 point of fp32.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from PIL import Image

from internvl_edge import compiler
from internvl_edge.compiler.plan import demo_checkpoint
from internvl_edge.demo import scenes
from internvl_edge.demo.compare import quality
from internvl_edge.export.config.checkpoint import load_config
from internvl_edge.export.synthetic import Synthesis, inject

RESULTS = Path(__file__).parent / "results" / "outliers.json"
NUM_SAMPLES = 32
RECIPES: dict[str, dict[str, Any]] = {
    "fp32": {"precision": "fp32"},
    "int8": {"precision": "int8"},
    "int8, plain": {"precision": "int8", "recipe": {"name": "plain", "smooth": 0.5}},
    "fp8": {"precision": "fp8"},
}


def with_outliers(source: Path, target: Path, seed: int) -> Path:
    """Copy a checkpoint to one that computes the same and is hard to quantize."""
    shutil.copytree(source, target)
    synthesis = Synthesis(config=load_config(source), seed=seed, outliers=True)
    for shard in target.glob("*.safetensors"):
        tensors = safetensors.numpy.load_file(shard)
        for name, values in tensors.items():
            rows = values.astype(np.float32)
            inject(synthesis, name, rows, 0)
            tensors[name] = rows.astype(values.dtype)
        safetensors.numpy.save_file(tensors, shard)
    return target


def scenes_folder(folder: Path) -> Path:
    """Write the demo's calibration scenes to a folder: a changed copy is not known as the demo."""
    folder.mkdir()
    pictures = scenes.calibration_images(NUM_SAMPLES, 0)
    for i, picture in enumerate(pictures):
        Image.fromarray(picture).save(folder / f"{i:03}.png")
    captions = scenes.calibration_texts(NUM_SAMPLES, 0)
    (folder / "captions.txt").write_text("\n".join(captions) + "\n", encoding="utf-8")
    return folder


def measure(checkpoint: Path, work: Path) -> dict[str, dict[str, float]]:
    figures = {}
    for name, how in RECIPES.items():
        options = dict(how)
        if how["precision"] != "fp32":
            options["calibration"] = work / "scenes"
        if "recipe" in options:
            file = work / "recipe.json"
            file.write_text(json.dumps(options["recipe"]), encoding="utf-8")
            options["recipe"] = file
        artifact = compiler.export(
            compiler.ExportOptions(checkpoint=checkpoint, out=work / "out", force=True, **options)
        )
        figures[name] = quality(artifact)
        print(
            f"{checkpoint.name:12} {name:12}", *(f"{k} {v:.4f}" for k, v in figures[name].items())
        )
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    seeds = parser.parse_args().seeds
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        scenes_folder(work / "scenes")
        results = {"none": measure(demo_checkpoint(), work)}
        for seed in seeds:
            changed = with_outliers(demo_checkpoint(), work / f"seed {seed}", seed)
            results[changed.name] = measure(changed, work)
    command = "python benchmarks/outliers.py --seeds " + " ".join(map(str, seeds))
    RESULTS.write_text(json.dumps({"command": command, "quality": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""The bundled demo over HTTP: INT8 and FP32 side by side, and pictures to search.

    python examples/serve_demo.py out/serve [OPTION ...]

The first time the demo is compiled twice, in a few minutes. Further options are those of
``internvl-edge serve``.
"""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image

from internvl_edge.__main__ import main
from internvl_edge.compiler import ExportOptions, export
from internvl_edge.demo.scenes import calibration_set, scene
from internvl_edge.errors import InternVLError

PRECISIONS = ("int8", "fp32")
NUM_PICTURES = 120


def write_pictures(folder: Path) -> None:
    """Draw scenes of scans that the model was never trained on."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(NUM_PICTURES):
        Image.fromarray(scene("held-out", 0, i).image).save(folder / f"{i:03}.png")


def prepare(root: Path) -> list[str]:
    """Compile what is missing; return what is served."""
    for precision in PRECISIONS:
        if not (root / precision).exists():
            sys.stdout.write(f"compiling the demo to {precision}\n")
            sys.stdout.flush()
            out = root / precision
            export(ExportOptions(out=out, precision=precision, samples=calibration_set))
    if not (root / "pictures").exists():
        write_pictures(root / "pictures")
    return [f"{precision}={root / precision}" for precision in PRECISIONS]


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit("usage: serve_demo.py FOLDER [OPTION ...]")
    root = Path(sys.argv[1])
    try:
        served = prepare(root)
    except InternVLError as error:
        sys.exit(f"error: {error}")
    main(["serve", *served, "--gallery", str(root / "pictures"), *sys.argv[2:]])
